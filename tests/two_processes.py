"Distillation, variational training and pruning where each of `n` processes sees its part of every batch (gloo, no GPU): two_processes.py rank n folder name…"
import os, subprocess, sys, warnings

warnings.filterwarnings('ignore')
from common import quiet, still
from kdnb.all import *
import torch.distributed as tdist
from torch.nn.parallel import DistributedDataParallel

TERMS = dict(fitnet=FitNet(['conv1','conv2'], norm=False)*10, vid=VID(['conv1','conv2'], norm=False), crd=CRD({'fc2': 'fc1'}, K=None, T=.5),
             simkd=SimKD('conv2', norm=False))      # BatchNorm would see another batch on each process
PRUNERS = {k: partial(Pruner, .8, k, schedule='gradual', rounds=3) for k in ('magnitude','snip')}
NOISY = {f'{groups}_{noise}': dict(groups=groups, noise=noise) for groups,noise in (('neurons','group'), ('channels','group'), ('channels','full'))}

class Wrap(Callback):
    order = 11   # as fastai's DistributedTrainer
    def before_fit(self): self.learn.model = DistributedDataParallel(self.model)
    def after_fit(self): self.learn.model = self.model.module

class Keep(Callback):
    order = 10   # before the wrap is taken off
    def after_train(self): self.state = {k.removeprefix('module.'): v.detach().clone() for k,v in [*self.model.named_parameters(), *self.model.named_buffers()]}

class RankDL(TensorDL):
    "Every `n`-th sample of each batch of 32, from the `rank`-th on"
    def __init__(self, *args, rank=0, n=1, **kwargs): self.rank,self.ranks = rank,n; super().__init__(*args, **kwargs)
    def __len__(self): return 5
    def get_idxs(self): return [i for b in range(0, 160, 32) for i in range(b+self.rank, b+32, self.ranks)]

def train(name, rank=0, n=1):
    "Parameters and buffers of student and heads after two epochs"
    digits = image_dls('digits', device='cpu')
    dl = RankDL(digits.train.dataset, bs=32//n, rank=rank, n=n, after_batch=digits.train.after_batch)
    set_seed(2); teacher = create('lenet5_caffe', digits)
    set_seed(1)
    student = create('lenet5', digits)
    if name in NOISY: student = still(to_variational(student, digits, **NOISY[name]))
    learn = Learner(ArrayDataLoaders(dl, digits.valid, device='cpu'), student, opt_func=SGD, lr=.02, wd=0, cbs=Wrap() if n>1 else None)
    cb = KnowledgeDistillation(teacher, TERMS[name]) if name in TERMS else VariationalSparsifier(2., warmup=.3) if name in NOISY else PRUNERS[name]()
    quiet(learn, 2, cbs=[cb, keep := Keep()])
    return keep.state

def both(folder, *names):
    "What two processes end with, each as `{name: state}`"
    runs = [subprocess.Popen([sys.executable, __file__, str(r), '2', folder, *names], env={**os.environ, 'OMP_NUM_THREADS': '1'}) for r in (0,1)]
    assert [p.wait(300) for p in runs]==[0,0]
    return [torch.load(f'{folder}/{r}.pth', weights_only=True) for r in (0,1)]

if __name__=='__main__':
    rank,n,folder,names = int(sys.argv[1]),int(sys.argv[2]),sys.argv[3],sys.argv[4:]
    torch.set_num_threads(1)
    tdist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=n)
    torch.save({name: train(name, rank, n) for name in names}, f'{folder}/{rank}.pth')
