"""What VBGS-KD is compared with: plain training, distillation, and distillation with a penalty or none, pruned within a budget of
validation accuracy. As many epochs as VBGS-KD's student and sparse stage together have."""
from functools import partial
import numpy as np, torch
from kdnb.all import *
from kdnb.recipes.run import Run
from kdnb.recipes.settings import check_epochs,check_settings

METHODS = 'plain','KD','KD + L1','KD + group L1'

baselines_defaults = dict(
    methods=METHODS, # Which of them; 'KD' is pruned by magnitude, too: single weights, and groups
    lam=.9, # As in `vbgs_kd_defaults`, like the next five
    T=4.,
    lr=1e-3,
    teacher_lr=3e-3,
    pct_start=.6,
    l1=3e-5, # Weight of the L1 penalty
    group_l1=3e-5, # Weight of the group penalty
    budget=.002, # Validation accuracy that pruning may cost
    step=.02) # Of the sparsities that are tried

def groups_of(model, dls):
    "The groups that VBGS-KD weighs: of each its size and `[(path of a reader, places on its inputs, unit at each)]`"
    found = {}
    for path,m in variational_layers(to_variational(model, dls, 'channels')).items():
        for i,g in enumerate(getattr(m.inputs, 'gates', [m.inputs])):
            places = getattr(m.inputs, f'places{i}', torch.arange(g.n).repeat(2, 1))
            found.setdefault(g, []).append((path, *places.to(dls.device)))
    return [(g.n, parts) for g,parts in found.items()]

def summed(values, groups):
    "`{path: value of each input}`, added up for the units of each group"
    def of(n, v, at, unit): return v.new_zeros(n).index_add(0, unit.to(v.device), v[at.to(v.device)])
    return [sum(of(n, values[p], *places) for p,*places in parts) for n,parts in groups]

def norms(model, groups):
    "L2 norm, and number, of the weights of every unit, for each group"
    weights = {p: model.get_submodule(p).weight.transpose(0, 1).flatten(1) for _,parts in groups for p,*_ in parts}
    squares = {p: w.square().sum(1) for p,w in weights.items()}
    sizes = {p: torch.full_like(squares[p], w.shape[1]) for p,w in weights.items()}
    return [(s+1e-12).sqrt() for s in summed(squares, groups)],summed(sizes, groups)

def group_l1(model, groups): return sum((n.sqrt()*v).sum() for v,n in zip(*norms(model, groups)))

@torch.no_grad()
def cut_groups(model, level, groups):
    "Zero in `model` the fraction `level` of all units: those of the smallest weights (root mean square)"
    worth = [v/n.sqrt() for v,n in zip(*norms(model, groups))]
    every = torch.cat(worth)
    least = every.sort().values[int(level*len(every))]
    for (_,parts),w in zip(groups, worth):
        for p,at,unit in parts: model.get_submodule(p).weight[:,at[(w<least)[unit.to(w.device)].to(at.device)].to(w.device)] = 0
    return model

def cut_weights(model, level): return fold(prune_model(model, level))

def within_budget(model, dls, cut, budget, step):
    "The sparsest `cut(copy, level)` that loses at most `budget` of validation accuracy"
    best,floor = model,accuracy_on(model, dls.valid)-budget
    for level in np.arange(step, 1, step):
        if accuracy_on(new := cut(deepcopy(model), level), dls.valid)>=floor: best = new
    return best

def baselines(dls, teacher='lenet5', student='lenet300', path='runs/vbgs_kd_baselines', epochs=(20,20,60), seeds=1, data='user data',
              force=False, show=True, **settings):
    "Each of `methods` on the data, teacher and epochs of `vbgs_kd`; returns the finished `Run`"
    s,epochs = check_settings('baselines', settings, baselines_defaults),check_epochs(epochs, 'the teacher', 'the student', 'the sparse stage')
    if odd := {*s['methods']}-{*METHODS}: raise ValueError(f'methods names {sorted(odd)[0]!r}. There are {", ".join(METHODS)}.')
    torch.set_flush_denormal(True)   # weights under a group penalty die through denormal numbers, which cost 4 times as much
    run = Run(path, 'vbgs-kd-baselines', dls, data, seeds, force, show, teacher=teacher, student=student, epochs=[*epochs], **s)
    (n_teacher,n_student,n_sparse),methods = epochs,s['methods']
    for seed in run.each_seed():
        taught = lambda: []
        if {*methods}-{'plain'}:
            t = run.teacher(teacher, n_teacher, s['teacher_lr'])
            taught = lambda: [KnowledgeDistillation(t, KD(T=s['T'])*s['lam'], task=1-s['lam'], cache=run.cache)]
        def fit(stage, model, n_epoch, cbs, **kwargs):
            return run.fit(stage, run.learner(model, wd=0.), n_epoch, s['lr'], 'fit_flat_cos', cbs=cbs, pct_start=s['pct_start'], **kwargs)
        def enter_small(stage, model, of):
            small = shrink(model, dls).eval()
            run.enter(stage, small, of=of, widths=layer_widths(small))
        net = run.network(student)
        groups,prune = groups_of(net, dls),partial(within_budget, dls=dls, budget=s['budget'], step=s['step'])
        by_weight,by_group = partial(prune, cut=cut_weights),partial(prune, cut=partial(cut_groups, groups=groups))
        if 'plain' in methods: fit('plain', run.network(student), n_student+n_sparse, [])
        if 'KD' in methods:
            kd = fit('KD', run.network(student), n_student+n_sparse, taught())
            run.enter('KD + magnitude', by_weight(kd), of=kd)
            enter_small('KD + group magnitude', by_group(kd), kd)
        if not {'KD + L1','KD + group L1'} & {*methods}: continue
        dense = run.fit('student', run.learner(net), n_student, s['lr'], cbs=taught())
        if 'KD + L1' in methods:
            l1 = fit('L1', dense, n_sparse, [*taught(), Penalty('l1', s['l1'])])
            run.enter('KD + L1', by_weight(l1), of=dense)
        if 'KD + group L1' in methods:
            grouped = fit('group L1', dense, n_sparse, [*taught(), Penalty(group_l1, s['group_l1'], groups=groups)])
            enter_small('KD + group L1', by_group(grouped), dense)
    return run.finish([*run.models.values()][-1], of=None)
