"PrUE: teachers of every kind, what their students learn, and the numbers and pictures that compare them."
from fractions import Fraction

import pytest
from common import X, Y, quiet, same, state
from kdnb.all import *
from kdnb.recipes.prue import _smoothed

def data(**kwargs): return from_arrays(X[:160], Y[:160], test=(X[160:], Y[160:]), bs=32, **kwargs)
def net(seed=0, n=8):
    set_seed(seed)
    return nn.Sequential(OrderedDict(conv1=nn.Conv2d(1,n,3,padding=1), bn1=nn.BatchNorm2d(n), act1=nn.ReLU(), conv2=nn.Conv2d(n,2*n,3,2,1),
                                     act2=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(32*n,10)))
def recipe(path, dls=None, teacher=None, **kwargs):
    kwargs = dict(student=net(1, 4), assistant=net(2, 6), epochs=(3,1,2), lr=.1, n_points=40, show=False) | kwargs
    return prue(dls or data(), teacher or net(), path=path, **kwargs)
def row(run, name, seed=0): return next(o for o in run.stages if o['name']==name and o['seed']==seed)

KW = dict(seeds=2, sparsities=(.2,.9), criteria=('prue','snip'))
@pytest.fixture(scope='module')
def demo(tmp_path_factory): return recipe(tmp_path_factory.mktemp('prue')/'run', **KW)

def forbid(monkeypatch):
    def fit(*args, **kwargs): raise AssertionError('something is trained')
    monkeypatch.setattr(Learner, 'fit', fit)


@pytest.mark.parametrize('alpha,c', [(.2,10), (.1,2), (0.,3)])
def test_smoothed_labels(alpha, c):
    "Equation 4, written out in double precision"
    torch.manual_seed(0)
    z,y = torch.randn(7,c, dtype=torch.double),torch.randint(c, (7,))
    labels = torch.full((7,c), alpha/(c-1), dtype=torch.double).scatter_(1, y[:,None], 1-alpha)
    assert torch.allclose(_smoothed(alpha, c)(z.float(), y).double(), -(labels*z.log_softmax(1)).sum(1).mean(), rtol=1e-6)

def test_what_is_trained(demo):
    pruned = [f'{c} {s}' for c in ('prue','snip') for s in (.2,.9)]
    teachers = ['teacher','smoothed',*pruned]
    assert [o['name'] for o in demo.stages if 'taught_by' not in o]==[*teachers,'assistant']
    students = ['alone', *(f'from {o}' for o in teachers), *(f'by {o}' for o in ('Logits(1)','FitNet','AT','PKT','TA'))]
    assert [o['name'] for o in demo.stages if 'taught_by' in o]==2*students     # Logits(4) is 'from teacher'
    assert {o['taught_by'] for o in demo.stages if 'taught_by' in o}=={'nobody','assistant',*teachers}
    n = n_weights(net())
    for c in ('prue','snip'):
        for s in (.2,.9): assert row(demo, f'{c} {s}')['weights']==n-math.ceil(Fraction(str(s))*n)
    assert [*demo.exhibits]==['teachers','methods','uncertainty','criteria','answers']

@pytest.mark.parametrize('criterion', ['prue','snip'])
def test_one_shot(demo, criterion):
    "Scores are those of the trained teacher, and fine-tuning leaves the zeros where they are"
    keep = masks(prune_model(deepcopy(demo.models['teacher']), .9, criterion, data()))
    tuned = masks(demo.models[f'{criterion} 0.9'])
    assert same(keep, tuned)
    assert all((w[tuned[k]==0]==0).all() for k,w in prunable(demo.models[f'{criterion} 0.9']).items())

def test_the_numbers(demo):
    dls,df = data(),teachers_table(demo)
    for k in df.index:
        assert row(demo, k)['uncertainty']==uncertainty(demo.models[k], dls.train)
        acc = [100*row(demo, f'from {k}', s)['test_accuracy'] for s in (0,1)]
        assert df.loc[k,'student accuracy (%)']==round(np.mean(acc), 2) and df.loc[k,'spread']==round(np.std(acc, ddof=1), 2)
    e = demo.exhibits['uncertainty']
    assert f'r = {np.corrcoef(e.data.x, e.data.y)[0,1]:.2f}' in e.text and len(e.data)==6
    lines = demo.exhibits['criteria'].data
    assert list(lines['snip'].x)==[0,20,90] and round(lines['snip'].y[2], 2)==df.loc['snip 0.9','student accuracy (%)']
    assert demo.exhibits['answers'].data.panel.nunique()==4 and {*demo.exhibits['answers'].data.label}<={str(o) for o in range(10)}
    read = Record(demo.path)
    assert teachers_table(read).equals(df) and methods_table(read).equals(methods_table(demo))
    assert list(methods_table(read).index)==['alone','Logits(4)','Logits(1)','FitNet','AT','PKT','TA','PrUE (20 %)','PrUE (90 %)']

def test_the_student_that_is_kept(demo):
    "The best on the validation set, of the first seed's that PrUE's teachers taught"
    small = load_model(demo.path/'model.safetensors', lambda: net(1, 4))
    acc = [row(demo, f'from prue {s}')['valid_accuracy'] for s in (.2,.9)]
    assert accuracy_on(small, data().valid)==max(acc)
    assert f"{teachers_table(demo).loc['teacher','student accuracy (%)']:.2f} % from the unpruned teacher" in demo.verdict

def test_found_again(demo, monkeypatch):
    forbid(monkeypatch)
    again = recipe(demo.path, **KW)
    assert [o['mark'] for o in again.stages]==[o['mark'] for o in demo.stages]
    assert teachers_table(again).equals(teachers_table(demo))
    with pytest.raises(ValueError, match='T is 2.0, was 4.0'): recipe(demo.path, **KW | dict(T=2.))

def test_lam_0_is_training_alone(tmp_path):
    run = recipe(tmp_path/'run', lam=0., criteria=('random',), sparsities=(.5,), methods=('Logits(1)',), smoothing=None)
    alone = state(run.models['alone'])
    assert all(same(alone, state(run.models[k])) for k in ('from teacher','from random 0.5','by Logits(1)')) and 'smoothed' not in run.models

def test_lam_1_never_sees_a_label(tmp_path):
    "Students of the same teacher are the same, whatever the labels are"
    dls,wrong = data(),data()
    for o in (wrong.train, wrong.valid): o.dataset.y = (o.dataset.y+3)%10
    learn = quiet(Learner(dls, net(), loss_func=CrossEntropyLossFlat()), 2, 3e-3, fit='fit_one_cycle')
    kwargs = dict(criteria=(), methods=(), smoothing=None)
    a,b = (recipe(tmp_path/str(i), o, learn, **kwargs).models for i,o in enumerate((dls,wrong)))
    assert same(state(a['from teacher']), state(b['from teacher'])) and not same(state(a['alone']), state(b['alone']))

def test_a_trained_learner_and_a_method_of_one_s_own(tmp_path):
    dls = data()
    learn = quiet(Learner(dls, net(), loss_func=CrossEntropyLossFlat()), 2, 3e-3, fit='fit_one_cycle')
    before = state(learn.model)
    run = recipe(tmp_path/'run', dls, learn, methods={'mine': DKD(), 'assisted': 'TA'}, criteria=('magnitude',), sparsities=(.5,))
    assert same(before, state(learn.model)) and run.models['teacher'] is learn.model
    assert list(methods_table(run).index)==['alone','Logits(4)','mine','assisted'] and 'DKD' in run.settings['methods']['mine']
    assert 'epochs' in row(run, 'smoothed') and 'epochs' not in row(run, 'teacher')

def test_plain_loaders_without_a_test_set(tmp_path):
    items = [(x.float()/255, int(y)) for x,y in zip(X[:60], Y[:60])]
    dls = DataLoaders(*(DataLoader(o, bs=20, shuffle=i==0, num_workers=0) for i,o in enumerate((items[:40],items[40:])))); dls.c = 10
    run = recipe(tmp_path/'run', dls, criteria=('prue',), sparsities=(.5,), methods=('PKT',))
    assert not run.has_test and len(teachers_table(run))==3 and {*run.exhibits}=={'teachers','methods','uncertainty','criteria','answers'}

@pytest.mark.parametrize('words,kwargs', [
    ("no setting 'tau'", dict(tau=1)), ('expected 3 whole numbers', dict(epochs=10)), ('write 0.2', dict(sparsities=(20,))),
    ('criterion is', dict(criteria=('prude',))), ("'bn_scale' scores channels", dict(criteria=('bn_scale',))), ('no method is called', dict(methods=('KD',))), ('no method is called', dict(methods='Logits(four)')), ('T is', dict(T=0.)),
    ('lam is', dict(lam=2.)), ('smoothing is', dict(smoothing=1.5)), ('has no maps', dict(methods=('AT',), student=lenet300(in_shape=(1,8,8)))),
    ("no layer 'fc9'", dict(layers='fc9')), ('layers is 3', dict(layers=3)), ('no weight in', dict(layers=())),
    ('no network is called', dict(student='resnet9')), ('no network is called', dict(assistant='resnet9')),
    ('no linear layer', dict(methods=('PKT',), student=nn.Sequential(nn.Conv2d(1,10,3), nn.AdaptiveAvgPool2d(1), nn.Flatten())))])
def test_refused(tmp_path, monkeypatch, words, kwargs):
    forbid(monkeypatch)
    with pytest.raises(ValueError, match=words): recipe(tmp_path/'run', **kwargs)

@pytest.mark.long
@pytest.mark.parametrize('layers,names', [('conv', ['conv1.weight','conv2.weight']), (['conv2','fc'], ['conv2.weight','fc.weight'])])
def test_only_some_layers_are_pruned(tmp_path, layers, names):
    "The part that goes is one of their weights; all others stay"
    run = recipe(tmp_path/'run', layers=layers, criteria=('prue',), sparsities=(.9,), methods=(), smoothing=0)
    pruned,n = masks(run.models['prue 0.9']),n_weights(net())
    size = sum(m.numel() for m in pruned.values())
    assert sorted(pruned)==names and sum(int((m==0).sum()) for m in pruned.values())==n_of(.9, size)
    assert row(run, 'prue 0.9')['weights']==n-n_of(.9, size) and 'smoothed' not in run.models
    assert row(run, 'prue 0.9')['mark']!=row(recipe(tmp_path/'all', criteria=('prue',), sparsities=(.9,), methods=(), smoothing=0), 'prue 0.9')['mark']
