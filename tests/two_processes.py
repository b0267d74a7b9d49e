"""Distillation, variational training, pruning and recipes where each of two processes sees its part of every batch
(gloo, no GPU). torchrun starts this file once for all tests: two_processes.py folder"""
import signal, sys, warnings

warnings.filterwarnings('ignore')
from common import data, quiet, still
from elsewhere import elsewhere
from kdnb.all import *
from kdnb.training.processes import alone, join_processes
from torch.distributed.run import main as torchrun
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

def sparse_run(path):
    "Li et al. 2022 in small, with a report"
    dls = image_dls('digits', bs=128, drop_last=True, device='cpu')
    run = vbgs_kd(dls, 'lenet5_caffe', 'lenet300', path, (4,4,24), data='digits', gamma_weight=40., show=False)
    if run.rank==0: run.report()

def other_runs(path):
    "Malihi and Heidemann 2023, and Ahn et al. 2019: what could be waited for in vain"
    kwargs = dict(dls=data(device='cpu'), show=False)
    distill_then_prune(teacher='lenet5_caffe', student='lenet5', path=path/'sequential', epochs=(1,1,1), levels=(0,.5), sweep_epochs=1, **kwargs)
    vid(teacher='resnet8', student='resnet8', path=path/'vid', epochs=(1,1,1,1), experiments='maps', quick=True, **kwargs)

def _both(folder):
    signal.alarm(900)     # if they wait for each other in vain
    # forked and not started anew, they need not import what is imported here
    torchrun(['--standalone','--nproc_per_node','2','--start_method','fork','--run_path',__file__,str(folder)])

def both(folder):
    "Start two processes: the folder then holds their runs, and of each what every training ended with"
    elsewhere(_both, folder)

if __name__=='__main__':
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    sparse_run(folder/'vbgs_kd')
    other_runs(folder)
    rank,n = join_processes()
    with alone(): states = {name: train(name, rank, n) for name in (*TERMS, *NOISY, *PRUNERS)}
    torch.save(states, folder/f'{rank}.pth')
