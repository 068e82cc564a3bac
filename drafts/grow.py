"""Lay the inner levels of the f8 UNet into the f4 one; fit its time embedding's readers by least squares."""
exec(open('/tmp/s2/common.py').read())
from safetensors.torch import load_file, save_file
from concept_nodes.lab.train_denoiser import new_unet
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
import comfy.ops
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
torch.manual_seed(13)
old={k:v.float() for k,v in load_file('/tmp/s2/old/unet.safetensors').items()}
net=new_unet(); new=net.state_dict()
def emb(sd,mc):
    t=torch.arange(1000); e=timestep_embedding(t,mc)
    import torch.nn.functional as F
    h=F.linear(e,sd['time_embed.0.weight'],sd['time_embed.0.bias']); h=F.linear(F.silu(h),sd['time_embed.2.weight'],sd['time_embed.2.bias']); return F.silu(h)
fo=emb(old,64)
# fresh time embedding with wider spread so that its features are rich
new['time_embed.0.weight'].mul_(2); new['time_embed.2.weight'].mul_(3)
fn=emb(new,32); A=torch.cat([fn,torch.ones(1000,1)],1)
taken=0; fresh=[]
for k in new:
    p=k.split('.')
    src=k
    if p[0]=='input_blocks':
        src=None if int(p[1])<3 else '.'.join([p[0],str(int(p[1])-2),*p[2:]])
    elif p[0]=='output_blocks' and int(p[1])>5: src=None
    elif p[0] in('time_embed','out'): src=None
    if src is None or src not in old: fresh.append(k); continue
    if 'emb_layers.1.weight' in k:
        target=fo@old[src].T
        w=torch.linalg.lstsq(torch.cat([A,1e-2*torch.eye(A.shape[1])]),torch.cat([target,torch.zeros(A.shape[1],target.shape[1])])).solution
        print(k,'fit err',float((A@w-target).std()/target.std()), 'wmax',float(w.abs().max()))
        new[k].copy_(w[:-1].T); new[k.replace('weight','bias')].copy_(old[src.replace('weight','bias')]+w[-1]); taken+=2; continue
    if 'emb_layers.1.bias' in k: continue
    if old[src].shape==new[k].shape: new[k].copy_(old[src]); taken+=1
    else: fresh.append(k); print('shape',k,tuple(old[src].shape),tuple(new[k].shape))
print(taken,len(new),len(fresh)); 
import os; os.makedirs('/tmp/s2/start',exist_ok=True)
save_file({k:v.contiguous() for k,v in new.items()},'/tmp/s2/start/unet.safetensors')
