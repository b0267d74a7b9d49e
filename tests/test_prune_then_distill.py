"Prune, then distill: the schedule, the chain of pruned teachers, who teaches whom, and what is written down."
from fractions import Fraction

import pytest
from common import X, Y, quiet, same, state
from kdnb.all import *

BS = dict(bs=64)
def data(): return from_arrays(X[:160], Y[:160], test=(X[160:], Y[160:]), **BS)
def net(seed=0): set_seed(seed); return lenet300(in_shape=(1,8,8), hidden=(20,12))
def recipe(path, dls=None, teacher=None, **kwargs):
    kwargs = dict(epochs=(2,1,1), lr=.02, prune_lr=.02, show=False) | kwargs
    return prune_then_distill(dls or data(), teacher or net(), path=path, **kwargs)
def rows(run, *names): return [o for o in run.stages if o['name'] in names]

@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "Designed students with every kind of teacher, two seeds"
    return recipe(tmp_path_factory.mktemp('ptd')/'run', seeds=2, sparsities=(.36,.59,.79),
                  pairs=('alone','unpruned','pruned','mismatched'))

def forbid(monkeypatch):
    def fit(*args, **kwargs): raise AssertionError('something is trained')
    monkeypatch.setattr(Learner, 'fit', fit)


def test_the_rate_drops_as_in_torch():
    dls = data()
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), opt_func=nesterov_sgd)
    quiet(learn, 10, .1, fit='fit_drops', drops=(.3,.6,.8), factor=.2)
    opt = torch.optim.SGD(net().parameters(), lr=.1)
    sched,lrs = torch.optim.lr_scheduler.MultiStepLR(opt, [3,6,8], .2),[]
    for _ in range(10): lrs.append(opt.param_groups[0]['lr']); opt.step(); sched.step()
    n = len(dls.train)
    assert np.allclose(learn.recorder.hps['lr'], np.repeat(lrs, n), rtol=1e-12)

def test_the_optimiser_is_nesterov_s():
    "Against the update written out in double precision"
    torch.manual_seed(0)
    w,target = torch.randn(5, dtype=torch.double),torch.randn(5, dtype=torch.double)
    p = nn.Parameter(w.clone())
    opt = nesterov_sgd([p], lr=.1); opt.set_hypers(wd=.01)
    v = torch.zeros_like(w)
    for _ in range(5):
        p.grad = p.detach()-target; opt.step()
        g = w-target + .01*w
        v = .9*v + g
        w = w - .1*(g + .9*v)
    assert torch.allclose(p, w, rtol=1e-12)

@pytest.mark.parametrize('rate', [.05,.2,.5])
def test_rounds(rate):
    "Each stop is reached, and no round takes more than its part"
    for stops in [(.36,.59,.79), (.1,), (.2,.2001), (.9,.36), (.3,.6,.95)]:
        rounds = pruning_rounds(stops, rate)
        left = 1-np.array([0,*rounds])
        assert set(stops)<=set(rounds) and (np.diff(left)<0).all() and (left[1:]/left[:-1]>1-rate-1e-6).all()
    assert len(pruning_rounds((.36,.59,.79)))==7 and pruning_rounds((.36,))==[.2,.36]

def test_the_chain(demo):
    "Counts are exact at every station, students have what their teachers have left, and masks held"
    n = n_weights(net())
    for s in (.36,.59,.79): assert rows(demo, f'pruned {s}')[0]['weights']==n-math.ceil(Fraction(str(s))*n)
    assert [o['name'] for o in demo.stages if o['name'].startswith('pruned')]==[f'pruned {s:.4g}' for s in pruning_rounds((.36,.59,.79))]
    assert len(rows(demo, 'teacher'))==1     # one for all seeds
    masked = [{k: w==0 for k,w in prunable(demo.models[f'pruned {s:.4g}']).items()} for s in pruning_rounds((.36,.59,.79))]
    assert all((a[k]<=b[k]).all() for a,b in zip(masked, masked[1:]) for k in a)
    for s in (.36,.59,.79):
        pruned,student = (demo.models[k] for k in (f'pruned {s}',f'ST{100*s:.4g} alone'))
        same_shape(design_student(pruned, data()), student)
        assert demo.exhibits[f'ST{100*s:.4g}'].data.equals(student_table(pruned, student))

def same_shape(a, b): assert [p.shape for p in a.parameters()]==[p.shape for p in b.parameters()]

def test_who_teaches_whom(demo):
    df = pd.DataFrame([o for o in demo.stages if 'student' in o])
    want = {(f'ST{s}',t) for s in (36,59,79) for t in ('nobody','teacher','pruned 0.36','pruned 0.59','pruned 0.79')}
    assert {*zip(df.student, df.taught_by)}==want and len(df)==2*len(want) and 'Tables 8 and 12' in demo.exhibits['students'].title

def test_the_record(demo):
    "Agreement, smoothness and uncertainty are those of the networks; the table is their mean and spread"
    dls,nets = data(),demo.models
    for o in demo.stages:
        if o['seed']==0 and o.get('taught_by') in nets:
            assert o['agreement']==agreement(nets[o['name']], nets[o['taught_by']], dls.test)
        if o['name'].startswith('pruned'):
            assert o['smoothness']==smoothness(nets['teacher'], nets[o['name']], dls.train)
            assert o['uncertainty']==uncertainty(nets[o['name']], dls.train)
    table = taught_table(demo)
    acc = [100*o['test_accuracy'] for o in rows(demo, 'ST59 from pruned 0.79')]
    row = table.loc['ST59','pruned 0.79']
    assert len(acc)==2 and row['student accuracy (%)']==round(np.mean(acc), 2) and row['spread']==round(np.std(acc, ddof=1), 2)
    assert row['teacher accuracy (%)']==round(100*rows(demo, 'pruned 0.79')[0]['test_accuracy'], 2)
    assert table.equals(taught_table(Record(demo.path))) and rounds_table(demo).equals(rounds_table(Record(demo.path)))
    assert demo.verdict.startswith('ST79 has 2') and f"{table.loc['ST79','nobody']['student accuracy (%)']:.2f} % alone" in demo.verdict
    small = load_model(demo.path/'model.safetensors')
    name = min(demo.stages, key=lambda o: (not o['name'].startswith('ST79 from pruned'), o['seed'], -o['valid_accuracy']))['name']
    assert accuracy_on(small, dls.test)==rows(demo, name)[0]['test_accuracy'] and n_weights(small)==rows(demo, name)[0]['weights']

def test_alpha_0_is_training_alone(tmp_path):
    run = recipe(tmp_path/'run', student=net(1), sparsities=(.2,), alpha=0.)
    a,b,c = (run.models[f'student {o}'] for o in ('alone','from teacher','from pruned 0.2'))
    assert same(state(a), state(b)) and same(state(a), state(c))

def test_found_again(demo, monkeypatch):
    "A finished run is read, not trained, and not overwritten"
    forbid(monkeypatch)
    kwargs = dict(seeds=2, sparsities=(.36,.59,.79), pairs=('alone','unpruned','pruned','mismatched'))
    again = recipe(demo.path, **kwargs)
    assert [o['mark'] for o in again.stages]==[o['mark'] for o in demo.stages]
    assert taught_table(again).equals(taught_table(demo)) and [*again.exhibits]==[*demo.exhibits]
    with pytest.raises(ValueError, match='alpha is 0.5, was 0.95'): recipe(demo.path, alpha=.5, **kwargs)

def test_a_trained_learner_is_left_as_it_was(tmp_path):
    dls = data()
    learn = quiet(Learner(dls, net(), loss_func=CrossEntropyLossFlat()), 3, 3e-3, fit='fit_one_cycle')
    before = state(learn.model)
    run = recipe(tmp_path/'run', dls, learn, student=net(1), sparsities=(.36,), pairs=('unpruned','pruned'))
    assert same(before, state(learn.model)) and run.models['teacher'] is learn.model and 'epochs' not in rows(run, 'teacher')[0]
    assert {o['name'] for o in run.stages}=={'teacher','pruned 0.2','pruned 0.36','student from teacher','student from pruned 0.36'}
    assert 'Tables 1, 3 and 8' in run.exhibits['students'].title and 'agreement (%)' in taught_table(run)

@pytest.mark.parametrize('trained', [False,True])
def test_self_distillation(tmp_path, trained):
    "The student begins as the teacher's like, not as the teacher"
    dls,teacher = data(),net()
    run = recipe(tmp_path/'run', dls, Learner(dls, teacher) if trained else teacher, student='self', sparsities=(.2,), seeds=(0,5))
    same_shape(run.models['student alone'], teacher)
    assert run.exhibits['students'].title.startswith('Students by teacher (as Tables 2 and 8')
    a,b,c = (untrained(dls, teacher, s) for s in (0,0,1))
    assert same(state(a), state(b)) and not torch.equal(a.fc1.weight, c.fc1.weight) and not torch.equal(c.fc1.weight, teacher.fc1.weight)
    assert run.models['student alone'].fc1.weight.ne(run.models['teacher'].fc1.weight).all()

def test_self_distillation_does_not_begin_as_the_teacher(tmp_path):
    run = recipe(tmp_path/'run', from_arrays(X[:160], Y[:160], **BS), 'lenet300', student='self', sparsities=(.2,), epochs=(1,1,1), lr=1e-9)
    assert (run.models['student alone'].fc1.weight-run.models['teacher'].fc1.weight).abs().max()>.01

def test_plain_loaders_without_a_test_set(tmp_path):
    "fastai's own `DataLoaders`, item by item; a network of one's own"
    items = [(x.float()/255, int(y)) for x,y in zip(X[:60], Y[:60])]
    dls = DataLoaders(*(DataLoader(o, bs=20, shuffle=i==0, num_workers=0) for i,o in enumerate((items[:40],items[40:])))); dls.c = 10
    own = nn.Sequential(nn.Conv2d(1,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(8,10))
    run = recipe(tmp_path/'run', dls, own, sparsities=(.5,), rate=.5, epochs=(1,1,1))
    assert not run.has_test and run.n_test==20 and len(taught_table(run))==3 and 'nan' not in run.exhibits['students'].text

def test_nobody_teaches(tmp_path):
    run = recipe(tmp_path/'run', student=net(1), sparsities=.2, pairs='alone')
    assert list(taught_table(run).index)==[('student','nobody')] and [*run.exhibits['students_plot'].data]==['alone']

@pytest.mark.parametrize('words,kwargs', [
    ("no setting 'lambda_'", dict(lambda_=.5)), ('expected 3 whole numbers', dict(epochs=(1,2))), ('expected 3 whole numbers', dict(epochs=(1,0,2))),
    ('fractions between 0 and 1', dict(sparsities=())), ('write 0.36', dict(sparsities=(36,))), ('rate is 0 or 1', dict(rate=0)),
    ('each of pairs', dict(pairs=('alone','pruned ones'))), ('designed from pruned teachers', dict(pairs=('mismatched',), student='self')),
    ('pairs is empty', dict(pairs=())), ('T is', dict(T=0.)), ('no network is called', dict(student='resnet9')), ('no network is called', dict(teacher='vgg21')),
    ('cannot take images', dict(student=lenet300(in_shape=(1,28,28)))), ('seeds is 0', dict(seeds=0))])
def test_refused(tmp_path, monkeypatch, words, kwargs):
    forbid(monkeypatch)
    with pytest.raises(ValueError, match=words): recipe(tmp_path/'run', **kwargs)

@pytest.mark.parametrize('net', [lambda: create('vgg8', c=10, in_shape=(1,8,8), widths=[6,8,12,16,16]), lambda: create('resnet8', c=10, in_shape=(1,8,8))])
def test_uniform_is_the_widest_that_is_not_larger(net):
    "Against every fraction tried in turn"
    set_seed(0)
    model,x = net(),torch.randn(2,1,8,8)
    pruned = prune_model(model, .6)
    most,even = n_params(design_student(pruned, x)),design_student(pruned, x, uniform=True)
    def outs(m): return {k: o.weight.shape[0] for k,o in m.named_modules() if isinstance(o, nn.Conv2d)}
    whole,got = outs(model),outs(even)
    def at(f): return {k: max(1, math.floor(f*n+1e-9)) for k,n in whole.items()}
    def size(f):
        "Parameters with all widths at `f`: they scale as rows and columns of each weight do"
        w,n = at(f),0
        for k,p in model.named_parameters():
            shape = list(p.shape)
            for d in (0,1)[:p.ndim]: shape[d] = {n: w[c] for c,n in whole.items()}.get(shape[d], shape[d])
            n += math.prod(shape)
        return n
    fs = sorted({Fraction(i, n) for n in whole.values() for i in range(1, n+1)})
    best = max((f for f in fs if size(f)<=most), default=fs[0])
    assert got==at(best) and n_params(even)==size(best)<=most and even.training

def test_uniform_students(tmp_path):
    "Of the designed student's size, alone and from the pruned teacher; the network that is kept is a designed one"
    run = recipe(tmp_path/'run', sparsities=(.36,.79), rate=.5, seeds=2, pairs=('alone','pruned','uniform'))
    df = pd.DataFrame([o for o in run.stages if 'student' in o])
    want = {(f'{k}{s}',t) for k in ('ST','uniform') for s in (36,79) for t in ('nobody',f'pruned 0.{s}')}
    assert {*zip(df.student, df.taught_by)}==want and len(df)==2*len(want)
    for s in (36,79):
        own,even = (run.models[f'{k}{s} alone'] for k in ('ST','uniform'))
        same_shape(even, design_student(run.models[f'pruned 0.{s}'], data(), uniform=True))
        assert .8*n_params(own) < n_params(even) <= n_params(own)     # a channel more or less is many here
    means = df[df.student.str.startswith('uniform') & (df.taught_by!='nobody')].test_accuracy.mean()
    assert f'{100*means:.2f} % uniform, from pruned teachers' in run.exhibits['students'].text
    assert run.verdict.startswith('ST79 has') and 'as a uniform network of the same size' in run.verdict
    assert {*run.exhibits['students_plot'].data}=={'alone','from pruned teachers','uniform, alone','uniform, from pruned teachers'}
