exec(open('/tmp/s2/common.py').read())
from pathlib import Path
R=Path('/work/main/lab/runs')
which,rows,n=sys.argv[1],[tuple(map(int,r.split('x'))) for r in sys.argv[2].split(',')],int(sys.argv[3])
eye=Eye.load(folder=R)
lab=host_lab.LabModel(host_lab.load_model('unet',which),host_lab.load_clip(str(R/'text.safetensors')),host_lab.load_vae('vae',str(R/'vae.safetensors')))
for size,objects in rows:
    asked=M.ask(n,objects=objects,size=size,seed=900+objects)
    p=M.draw(lab,list(asked),size=size,seed=5000)
    r=eye.read(p); print(Path(which).name,size,objects,{k:round(v,3) for k,v in M.score(asked,r).items()},flush=True)
    M.sheet(p[:48],Path(f'/tmp/s2/ev_{Path(which).stem}_{size}_{objects}.png'))
