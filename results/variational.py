"""VBGS-KD at its limits on MNIST and Fashion-MNIST, three seeds, beside plain training, distillation, penalties, Han's pruning and
Bayesian compression without a teacher. Rows are added to variational.jsonl as they are done; rows that are there are not run again.
Give names of methods to run only these."""
import json, os, random, sys, time, warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'   # a process per core instead
from kdnb.all import *
from vbgs_kd import BUDGET, PENALTY, group_l1, l1, prune_within_budget

HERE = Path(__file__).parent
ROWS,CACHE = HERE/'variational.jsonl',HERE/'.cache'
SEEDS = 0,1,2
EPOCHS = 15,85         # of a student before it is made sparse, and while it is; networks that are not made sparse get the sum
TEACHER = {'lenet5': 25, 'lenet5_caffe': 12}      # epochs; MNIST's images are shifted by up to a pixel
LR = 1e-3
# What VBGS-KD is asked for; `shift`: students see images shifted by up to a pixel, labelled by the teacher; `singles`: weight of the
# KL when, for `singles_epochs`, each weight of the small network gets its own α; `tune`: epochs of distillation of the small network
# afterwards, which is a row of its own
BASE = dict(student='lenet300', teacher='lenet5', groups='neurons', lam=.9, T=4, shift=False, bs=256, lr=1e-3, gamma_lr=10., theta_weight=10.,
            epochs=(8,100), warmup=.5, cooldown=(.5,.8), pct_start=.6, singles=None, singles_epochs=60, tune=0)
SHIFT = dict(shift=True, T=2, bs=128, lr=2e-3, gamma_lr=5., theta_weight=3., epochs=(8,100), warmup=.4, cooldown=(.4,.7), pct_start=.5, tune=40)
WEIGHTS = dict(groups='weights', epochs=EPOCHS, warmup=.2, cooldown=None, pct_start=.75)
CAFFE = SHIFT | dict(student='lenet5_caffe', teacher='lenet5_caffe', groups='channels', epochs=(3,16), warmup=.7, cooldown=None, pct_start=.9)
GATES = 'conv2.inputs','fc1.inputs.gates.0','fc1.inputs.gates.1','fc2.inputs'     # of LeNet-5-Caffe
ACCURATE = dict(epochs=(8,60), warmup=.4, cooldown=(.4,.7), pct_start=.5)
VBGS = {'VBGS-KD, small': dict(gamma_weight=5000.), 'VBGS-KD, accurate': ACCURATE | dict(gamma_weight=1950.),
        'VBGS-KD, shifted': SHIFT | dict(gamma_weight=2300.), 'VBGS-KD, shifted, smaller': SHIFT | dict(gamma_weight=3200.),
        'VBGS-KD, LeNet-5-Caffe': CAFFE | dict(gamma_weight=dict(zip(GATES, (24000.,7000.,1400.,4500.))), tune=50),
        'VBGS-KD, groups and weights, LeNet-5-Caffe': CAFFE | dict(gamma_weight=dict(zip(GATES, (21000.,8000.,500.,1500.))), singles=20., tune=100),
        'VBGS-KD, single weights': WEIGHTS | dict(gamma_weight=40.), 'VBGS-KD, single weights, accurate': WEIGHTS | dict(gamma_weight=15.),
        'VBGS-KD, groups and weights': ACCURATE | dict(gamma_weight=800., singles=25.),
        'VBGS-KD, groups and weights, shifted': SHIFT | dict(gamma_weight=700., singles=15.),
        'VBGS-KD, groups and weights, shifted, smaller': SHIFT | dict(gamma_weight=700., singles=40.)}

def data(name, shift=False, bs=256):
    warnings.filterwarnings('ignore', category=FutureWarning)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)   # weights under a group penalty die through denormal numbers, which cost 4 times as much
    return image_dls(name, bs=bs, valid_pct=1/12, device='cpu', pad=int(shift))

def train(dls, model, n_epoch, seed, cbs=(), lr=LR, fit='fit_flat_cos', **kwargs):
    set_seed(seed)
    dls.train.rng = random.Random(seed)
    learn = Learner(dls, model, metrics=accuracy, wd=0., opt_func=fused_adam, cbs=cbs)
    with learn.no_bar(),learn.no_logging(): getattr(learn, fit)(n_epoch, lr, **kwargs)
    return learn

def teacher(name, data_name, seed):
    "The teacher, trained once"
    path,dls = CACHE/f'{name}_{data_name}_{seed}.pth',data(data_name, shift=data_name=='mnist')
    set_seed(seed)
    model = create(name, dls)
    if path.exists(): model.load_state_dict(torch.load(path)); return model
    train(dls, model, TEACHER[name], seed, lr=3e-3, fit='fit_one_cycle')
    CACHE.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)
    return model

def row(model, dls, **more):
    "What is written down of a network"
    return dict(test_accuracy=accuracy_on(model, dls.test), valid_accuracy=accuracy_on(model, dls.valid), weights=n_weights(model, nonzero=True),
                widths=[_in(m) for m in model.modules() if isinstance(m, weighted)], macs=macs(model, dls)[''], **more)
def _in(m): return m.in_features if isinstance(m, nn.Linear) else m.out_channels

def baseline(method, data_name, seed):
    dls = data(data_name)
    soft = KnowledgeDistillation(teacher('lenet5', data_name, seed), KD(T=4)*.9, task=.1, cache=True)
    set_seed(seed)
    model,both = create('lenet300', dls),sum(EPOCHS)
    if method=='plain': return [row(train(dls, model, both, seed).model, dls)]
    if method=='KD': return [row(train(dls, model, both, seed, soft).model, dls)]
    if method in PENALTY:
        train(dls, model, EPOCHS[0], seed, soft)
        train(dls, model, EPOCHS[1], seed, [soft, LossTerm(l1 if method=='KD + L1' else group_l1, PENALTY[method], 'penalty')])
        if method=='KD + L1': return [row(prune_within_budget(model, dls, torch.abs), dls)]
        masked = prune_within_budget(model, dls, lambda w: w.norm(dim=0, keepdim=True)/w.shape[0]**.5)
        return [row(shrink(masked, dls), dls)]
    if method=='Han':           # prune, train, prune, train (Han et al. 2015), no teacher
        learn = train(dls, model, EPOCHS[0], seed)
        with learn.no_bar(),learn.no_logging():
            levels = iterative_prune(learn, sparsity=.95, rate=.3, rewind='finetune', n_epoch=EPOCHS[1]//9, lr=LR/3)
        best = [o.model for o in levels if o.metrics['accuracy']>=levels[0].metrics['accuracy']-BUDGET][-1]
        return [row(fold(best), dls)]
    groups,noise = ('weights','group') if method=='SparseVD' else ('neurons','full')     # or BC-GNJ, no teacher
    train(dls, model, EPOCHS[0], seed)
    learn = train(dls, to_variational(model, groups=groups, noise=noise), EPOCHS[1], seed, VariationalSparsifier())
    masked = to_deterministic(learn.model)
    return [row(masked if method=='SparseVD' else shrink(masked, dls), dls)]

def vbgs(method, data_name, seed):
    o = BASE | VBGS[method]
    dls = data(data_name, o['shift'], o['bs'])
    soft = KnowledgeDistillation(teacher(o['teacher'], data_name, seed), KD(T=o['T'])*o['lam'], task=1-o['lam'], cache=True, n_views=9 if o['shift'] else None)
    set_seed(seed)
    dense = create(o['student'], dls)
    train(dls, dense, o['epochs'][0], seed, soft, o['lr'])
    sparsifier = VariationalSparsifier(1-o['lam'], **{k: o[k] for k in ('gamma_weight','theta_weight','warmup','cooldown','gamma_lr')})
    learn = train(dls, to_variational(dense, dls, o['groups']), o['epochs'][1], seed, [soft, sparsifier], o['lr'], pct_start=o['pct_start'])
    small = learn.compress()
    if o['singles']:
        sparsifier = VariationalSparsifier(1-o['lam'], gamma_weight=o['singles'])
        learn = train(dls, to_variational(small, dls, 'weights'), o['singles_epochs'], seed, [soft, sparsifier], o['lr'], pct_start=.75)
        small = learn.compress()
    rows = [row(small, dls, tuned=0)]
    if o['tune']:
        mask_model(small, {k: w!=0 for k,w in prunable(small).items()})
        rows.append(row(fold(train(dls, small, o['tune'], seed, soft, o['lr'], pct_start=.2).model), dls, tuned=o['tune']))
    return rows

def job(method, data_name, seed):
    start = time.perf_counter()
    rows = (vbgs if method in VBGS else baseline)(method, data_name, seed)
    head = dict(method=method, data=data_name, seed=seed, settings=BASE | VBGS[method] if method in VBGS else {})
    return [head | r | dict(seconds=round(time.perf_counter()-start)) for r in rows]

MNIST_ONLY = 'LeNet-5-Caffe','shifted'     # Fashion-MNIST's teacher sees no shifts, nor do its students
BASELINES = 'plain','KD',*PENALTY,'Han','SparseVD','BC-GNJ'

def main(only=()):
    done = {(o['method'], o['data'], o['seed']) for o in map(json.loads, ROWS.read_text().splitlines())} if ROWS.exists() else set()
    jobs = [(m, d, s) for d in ('mnist','fashion_mnist') for m in (*VBGS, *BASELINES) for s in SEEDS
            if (m, d, s) not in done and (d=='mnist' or not any(o in m for o in MNIST_ONLY)) and (not only or m.startswith(tuple(only)))]
    with ProcessPoolExecutor(min(2, os.cpu_count()), get_context('spawn')) as pool:
        for future in as_completed([pool.submit(job, *o) for o in jobs]):
            with ROWS.open('a') as f: f.writelines(json.dumps(o)+'\n' for o in future.result())

if __name__=='__main__': main(sys.argv[1:])
