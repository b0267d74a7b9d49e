"Ming et al. 2020 on MNIST: the stages of VBGS-KD, plain training and the ablation of Table 3, per seed. Writes vbgs_kd.json and vbgs_kd.npz."
import json, os, random, tempfile, time, warnings
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'   # a process per core instead
import numpy as np
from kdnb.all import *

HERE = Path(__file__).parent
SEEDS = 0,1,2
EPOCHS = 12,15,65     # teacher, student, sparse; plain training and KD alone get as many as student and sparse together
SETTINGS = dict()      # changes to the recipe's defaults
PENALTY = {'KD + L1': 3e-5, 'KD + group L1': 3e-5}
BUDGET = .002          # the pruned baselines may lose so much VALIDATION accuracy; VBGS-KD has no such choice

def data():
    warnings.filterwarnings('ignore', category=FutureWarning)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)   # weights under a group penalty die through denormal numbers, which cost 4 times as much
    return image_dls('mnist', bs=256, valid_pct=1/12, device='cpu')

def vbgs(seed, folder):
    "The recipe: a record, and for the pictures log α at four epochs and the masked weights"
    dls = data()
    run = vbgs_kd(dls, path=f'{folder}/{seed}', data='mnist', seeds=(seed,), epochs=EPOCHS, show=False, **SETTINGS)
    for name,model in run.models.items(): torch.save(model.state_dict(), f'{folder}/{seed}/{name}.pth') if name in ('teacher','student') else None
    shown = np.linspace(0, len(run.log_alphas)-1, 4).round().astype(int)
    figures = {f'log_alpha/{e+1}/{n}': o.half().numpy() for e in shown for n,o in run.log_alphas[e].items()}
    figures |= {f'weight/{n}': m.weight.detach().half().numpy() for n,m in run.models['sparse'].named_children() if isinstance(m, nn.Linear)}
    if seed==SEEDS[0]: plot_weights(run.models['sparse'])[0].figure.savefig(HERE.parent/'nbs'/'images'/'mnist_weights.png', dpi=110, metadata=dict(Software=None))
    layers = {k: cost(run.models[k], dls, latency=False).reset_index().to_dict('records') for k in ('student','small')}
    return dict(seed=seed, stages=run.stages, layers=layers, threshold=run.threshold, settings=run.settings,
                valid_accuracy={k: accuracy_on(m, dls.valid) for k,m in run.models.items()}), figures

def l1(cb): return sum(m.weight.abs().sum() for m in cb.model.modules() if isinstance(m, nn.Linear))
def group_l1(cb): return sum(m.weight.shape[0]**.5*m.weight.norm(dim=0).sum() for m in cb.model.modules() if isinstance(m, nn.Linear))

def baseline(name, seed, folder):
    "One row of the ablation, with the run's own teacher and (for the penalties) its distilled student"
    dls,start,s = data(),time.perf_counter(),vbgs_kd_defaults
    teacher,model = create('lenet5', dls),(set_seed(seed),create('lenet300', dls))[1]
    teacher.load_state_dict(torch.load(f'{folder}/{seed}/teacher.pth'))
    soft,n_epoch = KnowledgeDistillation(teacher, KD(T=s['T'])*s['lam'], task=1-s['lam'], cache=True),EPOCHS[1]+EPOCHS[2]
    if name in PENALTY:
        model.load_state_dict(torch.load(f'{folder}/{seed}/student.pth'))
        n_epoch,penalty = EPOCHS[2],LossTerm(l1 if name=='KD + L1' else group_l1, PENALTY[name], 'penalty')
    cbs = {'plain': [], 'KD': [soft]}.get(name) if name not in PENALTY else [soft, penalty]
    set_seed(seed)
    dls.train.rng = random.Random(seed)
    learn = Learner(dls, model, metrics=accuracy, wd=0., opt_func=fused_adam)
    with learn.no_bar(),learn.no_logging(): learn.fit_flat_cos(n_epoch, s['lr'], pct_start=s['pct_start'], cbs=cbs)
    rows = [row(name, seed, model, dls, start)] if name not in PENALTY else []
    if name=='KD': rows.append(row('KD + magnitude', seed, prune_within_budget(model, dls, torch.abs), dls, start))
    if name=='KD + L1': rows.append(row(name, seed, prune_within_budget(model, dls, torch.abs), dls, start))
    if name=='KD + group L1':
        masked = prune_within_budget(model, dls, lambda w: w.norm(dim=0, keepdim=True)/w.shape[0]**.5)
        rows.append(row(name, seed, shrink(masked, dls), dls, start))
    return rows

def prune_within_budget(model, dls, score):
    "The sparsest copy of `model`, its weights or groups of lowest `score` zero over all layers, that loses at most BUDGET of validation accuracy"
    layers = [n for n,m in model.named_modules() if isinstance(m, nn.Linear)]
    scores = {n: score(model.get_submodule(n).weight.detach()) for n in layers}
    ranked,best,floor = torch.cat([s.flatten() for s in scores.values()]).sort().values,model,accuracy_on(model, dls.valid)-BUDGET
    for level in np.arange(.01, 1, .01):
        new,cut = deepcopy(model),ranked[int(level*len(ranked))]
        for n in layers: new.get_submodule(n).weight.data *= scores[n]>=cut
        if accuracy_on(new, dls.valid)>=floor: best = new
    return best

def row(name, seed, model, dls, start):
    return dict(name=name, seed=seed, test_accuracy=accuracy_on(model, dls.test), valid_accuracy=accuracy_on(model, dls.valid),
                weights=n_weights(model, nonzero=True), params_kept=sum(int(p.count_nonzero()) for p in model.parameters()),
                macs=macs(model, dls)[''], seconds=time.perf_counter()-start)

def main():
    (HERE.parent/'nbs'/'images').mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(min(2, os.cpu_count()), get_context('spawn')) as pool:
        runs = []
        for job in [pool.submit(vbgs, seed, folder) for seed in SEEDS]: runs.append(job.result()); print(f'{len(runs)} runs done', flush=True)
        jobs = [pool.submit(baseline, name, seed, folder) for seed in SEEDS for name in ('plain','KD','KD + L1','KD + group L1')]
        rows = [r for job in jobs for r in job.result()]
    record = dict(data='mnist', seeds=SEEDS, epochs=EPOCHS, settings=runs[0][0]['settings'], penalties=PENALTY, budget=BUDGET,
                  versions=versions(), machine=machine(), runs=[r for r,_ in runs], baselines=rows)
    (HERE/'vbgs_kd.json').write_text(json.dumps(record, indent=1)+'\n')
    np.savez_compressed(HERE/'vbgs_kd.npz', **runs[0][1])

if __name__=='__main__': main()
