"The recipe `budget`: every way meets the budget, the same dense network teaches, differences are those within a seed."
from pathlib import Path
import pytest
from common import X, Y, data
from kdnb.all import *
from kdnb.recipes.registry import bring

def few(): return data(test=(X[:50], Y[:50]))

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return budget(few(), 'lenet5', tmp_path_factory.mktemp('budget')/'run', epochs=(2,1), macs=(.6,'20k'), seeds=2, n=32, update_bn=0, show=False)

def test_every_way_meets_every_budget(run):
    assert len(run.stages)==2*(1+2*4)
    full = next(o for o in run.stages if o['name']=='dense')['macs']
    for o in run.stages:
        if o['name']=='dense': continue
        assert o['macs'] <= dict([(.6,.6*full),('20k',20_000)])[o['budget']] and o['epochs']==1
    by = {o['name']: o for o in run.stages if o['seed']==0}
    for b in ('60 %','20k'): assert by[f'scratch, {b} of the MACs']['widths']==by[f'sensitivity, {b} of the MACs']['widths']
    assert 'uniform, 60 % of the MACs' in run.models

def test_differences_are_within_seeds(run):
    t,acc = budget_table(run),{(o['name'],o['seed']): o['test_accuracy'] for o in run.stages}
    a,b = 'uniform, 20k of the MACs','sensitivity, 20k of the MACs'
    over = np.array([100*(acc[a,s]-acc[b,s]) for s in (0,1)])
    assert t['over sensitivity'][a]==pytest.approx(over.mean(), abs=.006) and t['spread of that'][a]==pytest.approx(over.std(ddof=1), abs=.006)
    assert [*t.index][0]=='dense' and (t['over sensitivity'].dropna()[[o for o in t.index if o.startswith('sens')]]==0).all()

def test_report_and_record(run):
    again = Record(run.path)
    assert [*again.exhibits]==['budgets','accuracy','sensitivity','widths'] and again.verdict==run.verdict
    text = str(report(again))
    for o in ('Channels that stay','What the dense network can do without'): assert o in text
    pd.testing.assert_frame_equal(budget_table(again), budget_table(run))

@pytest.mark.long
def test_a_finished_run_is_read(run):
    now = budget(few(), 'lenet5', run.path, epochs=(2,1), macs=(.6,'20k'), seeds=2, n=32, update_bn=0, show=False)
    assert [o['test_accuracy'] for o in now.stages]==[o['test_accuracy'] for o in run.stages]

@pytest.mark.parametrize('kwargs,said', [(dict(ways=('l1',)), "a way is 'l1'"), (dict(macs=2.5), 'macs is 2.5'), (dict(macs=('20X',)), 'Units of macs'),
                                         (dict(epochs=(1,)), 'expected 2 whole numbers'), (dict(lam=1), "no setting 'lam'"), (dict(criterion='x'), 'criterion is')])
def test_what_is_refused_before_anything_is_trained(tmp_path, kwargs, said):
    with pytest.raises(ValueError, match=said): budget(few(), 'lenet5', tmp_path/'run', **kwargs)
    assert not (tmp_path/'run').exists()

@pytest.mark.long
def test_peers_meet_the_same_budget(tmp_path):
    "What Torch-Pruning cuts is as much as fits, trained as ours; the learning rate is chosen on the validation set"
    p = bring(str(Path(__file__).parents[1]/'results/budget/peers.py'))
    run = p.peers(few(), 'lenet5', tmp_path/'run', epochs=(1,1), macs=(.5,), lrs=(1e-2,), update_bn=1, show=False)
    dense,*small = run.stages
    assert [o['way'] for o in small]==[*p.WAYS]
    assert all(.4*dense['macs']<o['macs']<=.5*dense['macs'] and o['epochs']==(2 if o['way']==p.LONGER else 1) for o in small)
    by = {o['way']: o['widths'] for o in small}
    assert by[p.NOTHING]==by[p.OURS]!=by['uniform magnitude']!=by['global group norm']

def test_validation_accuracy_chooses_the_learning_rate_of_peers():
    p = bring(str(Path(__file__).parents[1]/'results/budget/peers.py'))
    rows = pd.DataFrame([dict(cell='x', teacher='lenet5', budget=.5, way=w, lr=lr, seed=s, valid_accuracy=v, test_accuracy=1-v)
                         for w,best in (('a',1e-3),('b',1e-2)) for s in (0,1) for lr,v in ((1e-3,.8+(best<2e-3)/10), (1e-2,.85))])
    best = p.chosen(rows)
    assert best.way.tolist()==['a','a','b','b'] and best.lr.tolist()==[1e-3]*2+[1e-2]*2 and best.seed.tolist()==[0,1]*2
