"A training step of a fastai Learner as a function, for timings: ratios in one process, one thread, the variants in turn, processor time."
import os, warnings

warnings.filterwarnings('ignore', category=FutureWarning)
from kdnb.all import *

def stepper(model, cbs=(), teacher=None, opt_func=Adam, shape=(1,28,28), bs=256):
    "A function that does one training step of a fastai Learner; with `teacher`, also its bare forward pass"
    dls = from_arrays(torch.randint(0, 256, (8*bs,*shape), dtype=torch.uint8), torch.arange(8*bs)%10, bs=bs, device='cpu')
    learn = Learner(dls, model, opt_func=opt_func, cbs=cbs)
    learn.remove_cbs([ProgressCallback, Recorder])
    learn.create_opt()
    learn.opt.set_hypers(lr=1e-3)
    learn.n_epoch,learn.n_iter,learn.dl,learn.epoch,learn.logger = 1000,8,dls.train,0,noop
    learn.recorder = None
    for event in ('before_fit','before_epoch','before_train'): learn(event)
    learn.pct_train,batches = .5,list(dls.train)
    def step(i=[0]):
        i[0] += 1
        if teacher is not None:
            with torch.no_grad(): teacher(batches[i[0]%8][0].as_subclass(Tensor))
        learn.one_batch(0, batches[i[0]%8])
    return step

def begin(*more):
    "One thread; Adam's averages of vanishing gradients are slow on either side of a ratio, so denormal numbers are flushed"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print(f'load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}', *more, 'one thread, in turn, processor time', sep='; ')
