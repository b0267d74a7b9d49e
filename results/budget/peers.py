"""One dense network and the same budgets: kdnb's `cut_to`, what Torch-Pruning (Fang et al. 2023) cuts, and a small network from
nothing. All are distilled from the dense network for the same epochs, at several learning rates; validation accuracy chooses."""
from functools import partial
from kdnb.all import *
from kdnb.compress.budget import Budget
from kdnb.compress.cut import cut_to
from kdnb.compress.learner import mix_fresh
from kdnb.recipes.run import Run
from kdnb.recipes.settings import check_epochs,check_settings

OURS,NOTHING,LONGER = 'kdnb','from nothing','from nothing, longer'
HALF = 'kdnb, half fresh'
PRUNERS = 'uniform magnitude','global group norm'
WAYS = OURS,*PRUNERS,NOTHING,LONGER

peers_defaults = dict(
    macs=(.5,.25), # Budgets: fractions of the dense network's multiply-accumulates
    ways=WAYS, # Which of them, or HALF; 'longer' has the epochs of the dense network, too
    criterion='magnitude', # What the least worthy channels of a group go by, in kdnb
    update_bn=11, # Training batches for BatchNorm statistics after every cut
    lrs=(3e-3,1e-2), # Largest learning rates that are tried for every small network: Adam, one cycle
    teacher_lr=5e-3) # The same for the dense network

def averaged(model, dls, n):
    "`model` with BatchNorm statistics of `n` training batches"
    with torch.no_grad(): torch.optim.swa_utils.update_bn((b[0] for b in itertools.islice(dls.train, n)), model)
    return model

def peer_pruner(name):
    "The pruner `name` of Torch-Pruning"
    try: import torch_pruning as tp
    except ModuleNotFoundError: raise ImportError(f'{name!r} is cut by Torch-Pruning: pip install torch-pruning.') from None
    if name=='uniform magnitude': return partial(tp.pruner.MagnitudePruner, importance=tp.importance.MagnitudeImportance(p=2))
    return partial(tp.pruner.GroupNormPruner, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True)

def pruned(name, model, xb, ratio):
    "A copy of `model` from which the pruner `name` has removed the fraction `ratio` of the channels"
    model,pruner = plain_copy(model).eval(),peer_pruner(name)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner(model, xb, pruning_ratio=ratio, ignored_layers=[head], in_channel_groups={}, out_channel_groups={}).step()
    return model

def within(budget, cut, tries=12):
    "The largest network of `cut(ratio)` that bisection finds within `budget`"
    low,high,best = 0.,1.,None
    for _ in range(tries):
        mid = (low+high)/2
        try: now = cut(mid)
        except (RuntimeError,ValueError,ZeroDivisionError): high = mid; continue     # a layer was emptied
        if budget.exceeded(now): low = mid
        else: high,best = mid,now
    if best is None: raise ValueError(f'no ratio leads to {budget.given}.')
    return best

def cut_by(way, learn, limit, s, folder):
    "The network within `limit` that `way` leads to"
    budget = Budget(learn.model, inputs(learn.dls, learn.model), dict(macs=limit))
    if way in PRUNERS: return averaged(within(budget, partial(pruned, way, learn.model, budget.xb[0][:1])), learn.dls, s['update_bn'])
    model = cut_to(learn, budget, 'sensitivity', s['criterion'], update_bn=s['update_bn'], cache=folder, show=False).model
    if way==HALF: mix_fresh(model, .5)
    elif way!=OURS:
        for m in model.modules():
            if hasattr(m, 'reset_parameters'): m.reset_parameters()
    return model

def widths(model): return [len(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)]

def peers(dls, teacher='resnet8', path='runs/peers', epochs=(15,10), seeds=1, data='user data', force=False, show=True, **settings):
    "Cut a dense network to budgets in kdnb's way and in others', and distil; returns the finished `Run`"
    s,epochs = check_settings('peers', settings, peers_defaults),check_epochs(epochs, 'the dense network', 'the small ones')
    run = Run(path, 'peers', dls, data, seeds, force, show, teacher=teacher, epochs=epochs, **s)
    for seed in run.each_seed():
        dense = run.teacher(teacher, epochs[0], s['teacher_lr'], stage='dense')
        for limit in s['macs']:
            for way in s['ways']:
                small = cut_by(way, run.learner(dense), limit, s, run.path/'sensitivity')
                for lr in s['lrs']:
                    run.fit(f'{way}, {100*limit:g} %, {lr:g}', run.learner(deepcopy(small)), sum(epochs) if way==LONGER else epochs[1], lr,
                            cbs=KnowledgeDistillation(dense, cache=run.cache), of=dense, more=dict(way=way, budget=limit, lr=lr, widths=widths(small)))
    return run.finish(run.models[f'{s["ways"][0]}, {100*s["macs"][0]:g} %, {s["lrs"][0]:g}'], of=run.models['dense'])

def chosen(rows):
    "Of the rows of small networks those at the learning rate of the best mean validation accuracy, for each network, budget and way"
    small = rows[rows.cell!='dense']
    mean = small.groupby(['teacher','budget','way','lr'], sort=False).valid_accuracy.mean()
    best = mean.loc[mean.groupby(level=[0,1,2], sort=False).idxmax()].index
    return small.set_index(['teacher','budget','way','lr']).loc[best].reset_index()
