"""What a `Run` costs beside the training in it, in processor time of one thread, and what a checkpoint of 25 million parameters takes.
Two runs of the same training differ by more than that cost, so it is added up inside one: all that is not `Learner.fit`, and in it the
checkpoint's part, which is all that a stage's learner has and a plain one has not."""
import os, statistics, tempfile, time, warnings

os.environ['OMP_NUM_THREADS'] = '1'
warnings.filterwarnings('ignore')
from kdnb.all import *

SETS = {'digits, lenet300, 500 epochs': ('digits', 'lenet300', 500), 'mnist, lenet300, 12 epochs': ('mnist', 'lenet300', 12)}

def timed(f):
    start = time.thread_time(), time.perf_counter()
    f()
    return time.thread_time()-start[0], time.perf_counter()-start[1]

def adds_up(cls, name, spent):
    "Let the method `name` of `cls` add its seconds to the list `spent`"
    method = getattr(cls, name)
    def timed_method(*args, **kwargs):
        start = time.thread_time()
        try: return method(*args, **kwargs)
        finally: spent.append(time.thread_time()-start)
    setattr(cls, name, timed_method)

def engine():
    fits,events = [],[]
    adds_up(Learner, 'fit', fits)
    adds_up(Checkpoint, '__call__', events)
    for title,(data,name,n) in SETS.items():
        try: dls = image_dls(data, device='cpu')
        except FileNotFoundError: print(f'{title}: no data'); continue
        fits.clear(); events.clear()
        with tempfile.TemporaryDirectory() as folder:
            def stage():
                run = Run(folder, 'bench', dls, show=False)
                run.finish(run.fit('student', run.learner(run.network(name)), n, 1e-3))
            whole,_ = timed(stage)
        training = sum(fits)-sum(events)
        print(f'{title:30} {whole:5.1f} s, of these training {training:5.1f} s, checkpoints {sum(events):.2f} s, the rest '
              f'(marks, tables, report) {whole-sum(fits):.2f} s: {whole/training:.3f} × training', flush=True)

class Timed(Checkpoint):
    share,seconds = None,[]
    def after_epoch(self): self.seconds.append(timed(super().after_epoch))

def big():
    dls = from_arrays(torch.randn(64,1,28,28), torch.arange(64)%10, bs=32, device='cpu')
    for opt in (SGD, fused_adam):
        model = nn.Sequential(nn.Flatten(), nn.Linear(784,4600), nn.ReLU(), nn.Linear(4600,4600), nn.ReLU(), nn.Linear(4600,10))
        learn,Timed.seconds = Learner(dls, model, opt_func=opt, moms=(.9,.9,.9)),[]
        with tempfile.TemporaryDirectory() as folder,learn.no_bar(),learn.no_logging(): learn.fit(7, 1e-4, cbs=Timed(folder))
        cpu,wall = (statistics.median(o[i] for o in Timed.seconds[1:]) for i in (0,1))
        print(f'checkpoint of {n_params(model)/1e6:.1f} M parameters, {opt.__name__:10}: {cpu:.2f} s of processor, {wall:.2f} s in all')

if __name__=='__main__':
    print(f'load {os.getloadavg()[0]:.1f}')
    big()
    engine()
