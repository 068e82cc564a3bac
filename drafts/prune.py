"""Prune the f8 DiT (width 160, 2+5 blocks, patch 1) into the f4 one (width 128, 3+7 blocks, patch 2)."""
import sys,tempfile; sys.path.insert(0,'/tmp/s2/repo/tests')
from pack import load_pack,use_host; load_pack(); use_host('/tmp/host',tempfile.mkdtemp(),'cpu')
import torch
from safetensors.torch import load_file, save_file
from concept_nodes.host import lab as H
from concept_nodes.lab.train_denoiser import new_dit
torch.manual_seed(13)
old={k:v.float() for k,v in load_file('/tmp/s2/old/dit.safetensors').items()}
new=new_dit().state_dict()
O,N,HEADS=160,128,4
# residual channels: those written and read most
imp=torch.zeros(O); vimp=torch.zeros(O)
for k,v in old.items():
    if k.endswith(('proj.weight','mlp.2.weight','linear2.weight')) and v.shape[0]==O: imp+=v.norm(dim=1)/v.norm()
    if k.endswith(('qkv.weight','mlp.0.weight','linear1.weight')) and v.shape[1]==O: imp+=v.norm(dim=0)/v.norm()
    if '.lin.weight' in k or 'adaLN_modulation.1.weight' in k: vimp+=v.norm(dim=0)/v.norm()
R=imp.topk(N).indices.sort().values; V=vimp.topk(N).indices.sort().values
pairs=[0,1,2,3,4,5]
dims=list(range(8))+[8+2*p+j for p in pairs for j in(0,1)]+[24+2*p+j for p in pairs for j in (0,1)]
D=torch.tensor(dims); A=torch.cat([h*40+D for h in range(HEADS)])   # attention dims
QKV=torch.cat([i*O+A for i in range(3)])
def mods(n): return torch.cat([i*O+R for i in range(n)])
def put(k,t): 
    assert new[k].shape==t.shape,(k,new[k].shape,t.shape); new[k].copy_(t)
def hidden(w0,w2,n=512): return (w0.norm(dim=1)*w2.norm(dim=0)).topk(n).indices.sort().values
for b in range(2):
    for s in('img','txt'):
        p=f'double_blocks.{b}.{s}_'
        put(p+'attn.qkv.weight',old[p+'attn.qkv.weight'][QKV][:,R]); put(p+'attn.qkv.bias',old[p+'attn.qkv.bias'][QKV])
        put(p+'attn.proj.weight',old[p+'attn.proj.weight'][R][:,A]); put(p+'attn.proj.bias',old[p+'attn.proj.bias'][R])
        h=hidden(old[p+'mlp.0.weight'],old[p+'mlp.2.weight'])
        put(p+'mlp.0.weight',old[p+'mlp.0.weight'][h][:,R]); put(p+'mlp.0.bias',old[p+'mlp.0.bias'][h])
        put(p+'mlp.2.weight',old[p+'mlp.2.weight'][R][:,h]); put(p+'mlp.2.bias',old[p+'mlp.2.bias'][R])
        put(p+'mod.lin.weight',old[p+'mod.lin.weight'][mods(6)][:,V]); put(p+'mod.lin.bias',old[p+'mod.lin.bias'][mods(6)])
        for n in('query_norm','key_norm'):
            k=[x for x in old if x.startswith(p+'attn.norm.'+n)][0]; put(k,old[k][D])
order={0:0,1:1,2:3,3:4,4:6}
for b,nb in order.items():
    p,q=f'single_blocks.{b}.',f'single_blocks.{nb}.'
    w1,w2=old[p+'linear1.weight'],old[p+'linear2.weight']
    h=hidden(w1[3*O:],w2[:,O:])
    rows=torch.cat([QKV,3*O+h]); cols=torch.cat([A,O+h])
    put(q+'linear1.weight',w1[rows][:,R]); put(q+'linear1.bias',old[p+'linear1.bias'][rows])
    put(q+'linear2.weight',w2[R][:,cols]); put(q+'linear2.bias',old[p+'linear2.bias'][R])
    put(q+'modulation.lin.weight',old[p+'modulation.lin.weight'][mods(3)][:,V]); put(q+'modulation.lin.bias',old[p+'modulation.lin.bias'][mods(3)])
    for n in('query_norm','key_norm'):
        k=[x for x in old if x.startswith(p+'norm.'+n)][0]; put(k.replace(p,q),old[k][D])
for part in('time_in','vector_in'):
    a,b=f'{part}.in_layer',f'{part}.out_layer'
    h=hidden(old[a+'.weight'],old[b+'.weight'],N)
    put(a+'.weight',old[a+'.weight'][h]); put(a+'.bias',old[a+'.bias'][h]); put(b+'.weight',old[b+'.weight'][V][:,h]); put(b+'.bias',old[b+'.bias'][V])
put('txt_in.weight',old['txt_in.weight'][R]); put('txt_in.bias',old['txt_in.bias'][R])
# new blocks and the patch layers start as they are made
save_file({k:v.contiguous() for k,v in new.items()},'/tmp/s2/start/dit.safetensors')
print('ok', sum(v.numel() for v in new.values())/1e6)
