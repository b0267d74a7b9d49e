"""What a `Run` costs beside the trainings in it, in processor time of one thread, and what a checkpoint of 25 million parameters takes.
The same training by a plain Learner and as a stage of a run, in turn; a table of ratios."""
import os, random, statistics, tempfile, time, warnings

os.environ['OMP_NUM_THREADS'] = '1'
warnings.filterwarnings('ignore')
from kdnb.all import *

ROUNDS,SETS = 3,{'digits, lenet300, 500 epochs': ('digits', 'lenet300', 500), 'mnist, lenet300, 12 epochs': ('mnist', 'lenet300', 12)}

def timed(f):
    start = time.thread_time(), time.perf_counter()
    f()
    return time.thread_time()-start[0], time.perf_counter()-start[1]

def plain(dls, name, n):
    set_seed(0, reproducible=True)
    for i,dl in enumerate(dls.loaders): dl.rng = random.Random(i)     # the very training that a stage is
    learn = Learner(dls, create(name, dls), metrics=accuracy, opt_func=fused_adam)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(n, 1e-3)

def staged(dls, name, n):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, 'bench', dls, show=False)
        run.finish(run.fit('student', run.learner(run.network(name)), n, 1e-3))

def engine():
    for title,(data,name,n) in SETS.items():
        try: dls = image_dls(data, device='cpu')
        except FileNotFoundError: print(f'{title}: no data'); continue
        rows = [(timed(lambda: plain(dls, name, n)), timed(lambda: staged(dls, name, n))) for _ in range(ROUNDS)]
        ratio = statistics.median(b[0]/a[0] for a,b in rows)
        print(f'{title:32} plain {statistics.median(a[0] for a,_ in rows):6.1f} s   run {statistics.median(b[0] for _,b in rows):6.1f} s   ratio {ratio:.3f}', flush=True)

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
