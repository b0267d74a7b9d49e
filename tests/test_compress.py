"Budgets are met and used up, nothing else of the learner changes, and what cannot be done is refused with what can."
import random
from types import SimpleNamespace

import pytest
from common import Two, data, flat, per_item, quiet, same, seeded, state
from test_sensitivity import Grouped
from kdnb.all import *
from kdnb.compress import budget as budgets,learner as compressing
from kdnb.compress.noise import settled

NETS = 'resnet8','vgg8_16','lenet5'
HOWS = 'sensitivity','uniform','global'
FEW = dict(n=64, update_bn=1)

def learner(net='resnet8', n_epoch=0, **kwargs):
    dls = data()
    learn = seeded(dls, create(net, dls) if isinstance(net, str) else net, **kwargs)
    return quiet(learn, n_epoch, 5e-3) if n_epoch else learn

def compress(learn, **kwargs):
    with learn.no_bar(),learn.no_logging(): return learn.compress_to(**dict(n_epoch=0) | FEW | kwargs)

def counts(model, dls): return dict(macs=macs(model, dls)[''], params=n_params(model), bytes=n_bytes(model))

def one_channel(learn, what):
    "The most that one channel of the dense network costs"
    groups,full = [g for g in channel_groups(learn.model, learn.dls) if not g.stays],counts(learn.model, learn.dls)
    return max(full[what]-counts(without(learn.model, [(g, torch.arange(g.n)<1)]), learn.dls)[what] for g in groups)

@pytest.fixture(params=NETS)
def learn(request): return learner(request.param)


# the budget

@pytest.mark.parametrize('how', HOWS)
def test_budgets_are_met_and_used_up(learn, how):
    full = counts(learn.model, learn.dls)
    for what,f in dict(macs=.5, params=.2, bytes=.7).items():
        small,most = compress(learn, how=how, **{what: f}),one_channel(learn, what)
        got = counts(small.model, learn.dls)
        assert f*full[what]-most < got[what] <= f*full[what], what
        assert {k: small.table[k]['cut'] for k in got}==got and {k: small.table[k]['dense'] for k in full}==full

def test_a_number_with_a_unit_is_exact():
    learn = learner('lenet5')
    left = n_params(compress(learn, how='uniform', params='5k').model)
    for limit in (5000, '5,000', '.005 M', left): assert n_params(compress(learn, how='uniform', params=limit).model)==left      # exactly what can be reached is
    assert n_params(compress(learn, how='uniform', params=left-1).model)<left

def test_all_of_several_limits_hold():
    learn = learner()
    small = compress(learn, how='global', macs=.5, params='20k', bytes='100kB')
    got = counts(small.model, learn.dls)
    assert got['macs']<=.5*763_520 and got['params']<=20_000 and got['bytes']<=100_000
    assert set(small.limits)=={'macs','params','bytes'}

@pytest.mark.parametrize('how', HOWS)
def test_widths_are_rounded(how):
    small = compress(learner(), macs=.4, how=how, round_to=8)
    assert (small.widths.after%8==0).all() and (small.widths.after>0).all()
    assert small.table.macs['cut'] <= .4*763_520

def test_no_group_is_emptied_and_what_stays_stays():
    learn = learner()
    with pytest.raises(ValueError, match='the smallest network has') as e: compress(learn, params=100, how='uniform')
    least = int(re.search(r'smallest network has ([\d,]+)', str(e.value))[1].replace(',', ''))
    tiny = compress(learn, params=least, how='uniform')
    assert n_params(tiny.model)==least and (tiny.widths.after==1).all() and tiny.model.fc.out_features==10
    kept = compress(learn, macs=.5, how='uniform', ignore='conv1')
    assert 'conv1' not in kept.widths.index and kept.model.conv1.out_channels==16
    with pytest.raises(ValueError, match='multiples of 8'): compress(learn, params=least, how='uniform', round_to=8)

def test_blocks_of_a_grouped_convolution():
    small = compress(learner(Grouped()), params=.6, how='global')
    assert small.widths['after']['a']%2==0 and small.model.b.groups==2

@pytest.mark.long
def test_milliseconds(monkeypatch):
    "With a clock that counts parameters: what is promised is what was measured"
    noise = random.Random(0)
    for o in (budgets,compressing): monkeypatch.setattr(o, 'latency', lambda ms, xb: [n_params(m)/1e4*noise.uniform(1, 1.1) for m in ms])
    learn = learner()
    for limit,most in ((.5,None), ('50%',None), ('4ms',4), (4,4)):
        t = compress(learn, ms=limit, how='uniform').table.ms
        assert t['cut'] <= (most or .5*t['dense'])

def test_milliseconds_of_onnxruntime(monkeypatch):
    "What runs there decides, and the sentence says so; the dense network is exported once"
    ready = []
    monkeypatch.setattr(budgets, 'in_onnxruntime', lambda m, xb: ready.append(m) or m)
    monkeypatch.setattr(budgets, 'median_ms', lambda ms: [n_params(m)/1e4 for m in ms])
    learn = learner('lenet5')
    small = compress(learn, ms=.5, runtime='onnx', how='uniform')
    assert small.table.ms['cut']<=.5*small.table.ms['dense']==.5*n_params(learn.model)/1e4 and sum(m is ready[0] for m in ready)==1
    assert f' ms for a batch of {len(inputs(learn.dls)[0])} in onnxruntime on one thread' in small.summary
    for kwargs,said in ((dict(macs=.5, runtime='onnx'), 'ms is no limit here'), (dict(ms=.5, runtime='tflite'), "tflite")):
        with pytest.raises(ValueError, match=said): compress(learn, **kwargs)

@pytest.mark.parametrize('what,given,value', [('macs',.5,4e7), ('macs','20M',2e7), ('macs','20 000k',None), ('macs','1.5G',None), ('params','12_345',12345),
                                              ('bytes','2MB',2e6), ('bytes','1 KiB',1024), ('ms','3 ms',3), ('ms','.01s',10), ('ms',5,5), ('params','10%',8e6),
                                              *[('macs',o,None) for o in (0,1,1.5,-.5,True,'','20X','0','1e',math.nan,math.inf,'M',[.5],'20MB','100%')]])
def test_how_limits_are_read(what, given, value):
    if value is not None: assert read_limit(what, given, 8e7)==pytest.approx(value)
    else:
        with pytest.raises(ValueError, match=f'^{what}.* (expected a fraction|is no limit)'): read_limit(what, given, 8e7)


# the order

def test_slopes_of_a_hull_only_rise():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x,y = np.arange(8),rng.normal(size=8)
        pieces = rising_slopes(x, y)
        slopes = [s for _,s in pieces]
        assert pieces[-1][0]==7 and min(slopes)>=0 and slopes==sorted(slopes)
        hull = np.interp(x, [0,*(p for p,_ in pieces)], np.cumsum([y[0], *(s*(b-a) for (b,s),a in zip(pieces, [0,*(p for p,_ in pieces)]))]))
        assert (hull<=np.maximum.accumulate(y)+1e-9).all()

def test_what_nobody_misses_goes_first():
    learn = learner(n_epoch=2)
    with torch.no_grad():      # the second half of these channels reaches nobody
        learn.model.layer3[0].conv2.weight[:,32:] = 0
        learn.model.layer3[0].conv1.weight[32:] *= 1e-3
    small = compress(learn, macs=.9, how='sensitivity', n=None, update_bn=0)
    assert small.widths.after['layer3.0.conv1']<64
    assert small.table.accuracy['cut']==pytest.approx(small.table.accuracy['dense'], abs=.06)
    assert set(small.sensitivity.group)==set(small.widths.index)

def test_uniform_is_uniform():
    w = compress(learner(), macs=.5, how='uniform').widths
    share = w.after/w.before
    assert share.max()-share.min() <= 2/16      # to within a channel or so of the narrowest

def test_global_takes_the_smallest():
    learn = learner('lenet5')
    with torch.no_grad(): learn.model.fc1.weight[:100] *= 1e-3
    w = compress(learn, params=.75, how='global').widths
    assert set(w.index[w.after<w.before])=={'fc1'}


# what comes out

def test_the_learner_stays_and_the_result_is_plain():
    learn = learner(n_epoch=1)
    before,model,modes,rows = state(learn.model),learn.model,[m.training for m in learn.model.modules()],list(learn.recorder.values)
    small = compress(learn, macs=.5, n_epoch=1)
    assert learn.model is model and same(state(model), before) and [m.training for m in model.modules()]==modes
    assert list(learn.recorder.values)==rows and all(p.requires_grad for p in model.parameters())
    assert not any(type(m).__module__.startswith('kdnb.') and 'Basic' not in type(m).__name__ and 'Pad' not in type(m).__name__ for m in small.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.model.modules()) and not masks(small.model)
    assert [*small.table.index]==['dense','cut','distilled'] and not small.model.training
    assert small.table.accuracy['distilled']==pytest.approx(accuracy_on(small.model, learn.dls.valid))

def test_the_cut_is_what_masks_would_do():
    learn = learner(n_epoch=1)
    small = cut_to(learn, Budget(learn.model, inputs(learn.dls), dict(macs=.5)), 'global', update_bn=0)
    groups,keep = channel_groups(learn.model, learn.dls),{}
    for g in groups:
        worth = sum(learn.model.get_submodule(p.path).weight.detach().double().abs().flatten(1).sum(1) for p in g.makers)
        keep[g.name] = torch.ones(g.n, dtype=torch.bool)
        if not g.stays: keep[g.name][worth.argsort()[:g.n-small.widths.after[g.name]]] = False
    masked = mask_model(deepcopy(learn.model), channel_masks(learn.model, keep, groups))
    assert max_difference(masked, small.model, learn.dls)<1e-6

def test_statistics_are_estimated_anew():
    learn = learner(n_epoch=3)
    cut = {n: compress(learn, macs=.3, how='uniform', update_bn=n) for n in (0,3)}
    assert cut[3].table.valid_loss['cut'] < cut[0].table.valid_loss['cut']
    assert torch.equal(flat(cut[3].model), flat(cut[0].model))

class Counts(Callback):
    def __init__(self): self.epochs,self.teachers = 0,set()
    def after_epoch(self): self.epochs += 1
    def before_train(self): self.teachers |= {id(cb.teacher) for cb in self.learn.cbs if isinstance(cb, KnowledgeDistillation)}

@pytest.mark.parametrize('steps,n_epoch', [(1,2), (2,3), (3,2)])
def test_epochs_are_shared_and_the_dense_network_teaches(steps, n_epoch):
    learn,counter = learner('lenet5'),Counts()
    small = compress(learn, params=.3, how='global', steps=steps, n_epoch=n_epoch, cbs=counter)
    assert counter.epochs==n_epoch and counter.teachers=={id(learn.model)}
    assert n_params(small.model)<=.3*n_params(learn.model)
    assert small.widths.before.tolist()==[6,16,120,84] and small.widths.after['fc1']==small.model.fc1.out_features

def test_given_terms_and_fit_method():
    learn = learner('vgg8_16')
    small = compress(learn, macs=.5, how='uniform', n_epoch=1, terms=KD(T=2)*.5+AT(['conv3']), task=.5, fit='fit_flat_cos', lr=1e-3)
    assert [n for n in small.learn.recorder.metric_names if 'KD' in n or 'AT' in n]==[]      # the terms are gone after training
    assert max(small.learn.recorder.lrs)==pytest.approx(1e-3)

@pytest.mark.parametrize('fresh', [0,.5,1])
def test_a_part_of_the_weights_is_fresh(fresh, monkeypatch):
    "What the table calls 'cut' is the network that kept its weights; the training begins with the mixture"
    begun = []
    class Begins(Callback):
        def before_fit(self): begun.append(self.model.conv2.weight.detach().clone())
    learn = learner('lenet5')
    with torch.no_grad(): learn.model.conv2.weight.fill_(1.)
    small = compress(learn, params=.5, how='uniform', n_epoch=1, fresh=fresh, cbs=Begins(), update_bn=0)
    assert begun[0].mean().item()==pytest.approx(1-fresh, abs=.02) and (fresh>0)==(begun[0].std().item()>0)
    with pytest.raises(ValueError, match='fresh is 1.5, expected'): learn.compress_to(macs=.5, fresh=1.5)

def test_masked_and_frozen_networks():
    learn = learner()
    prune_model(learn, .5)
    learn.model.requires_grad_(False)
    small = compress(learn, macs=.5, how='global', n_epoch=1)
    assert masks(learn.model) and not masks(small.model) and all(p.requires_grad for p in small.model.parameters())

def test_what_is_said():
    learn = learner(n_epoch=1)
    small = compress(learn, macs=.5, n_epoch=1)
    t = small.table.accuracy
    assert small.summary.startswith(f'{small.table.macs["cut"]:,} of 763,520 MACs (4') and f'{100*t["dense"]:.2f} % → {100*t["distilled"]:.2f} %' in small.summary
    assert small.summary in repr(small) and small.summary in small._repr_html_()
    assert len(small.plot())==2


# how much may be lost

def fake(drops):
    "`_compressed` of a network that loses `drops(fraction)` points"
    def made(learn, limits, **args):
        f = limits['macs']
        if f<.1: raise ValueError('this budget cannot be reached by removing channels')
        return SimpleNamespace(table=pd.DataFrame(dict(macs=[1000,int(1000*f)], valid_loss=[0,0], accuracy=[.9,.9-drops(f)/100])), f=f)
    return made

@pytest.mark.parametrize('edge', [.05,.3,.62,.9])
def test_the_smallest_that_keeps_the_drop(edge, monkeypatch):
    monkeypatch.setattr(compressing, '_compressed', fake(lambda f: 0 if f>=edge else 5))
    best = learner('lenet5').compress_to(max_drop=.01, tries=7)
    assert max(edge, .1) <= best.f <= max(edge, .1)+2**-7+1e-9
    assert (best.tries.kept==(best.tries.fraction>=edge)).all()

def test_of_an_error_more_is_worse():
    learn = learner('lenet5')
    learn.metrics = L(AvgMetric(error_rate))
    small = compress(learn, params=.5, how='uniform')
    small.table['error_rate'] = [.1,.15]
    assert '10.00 % → 15.00 %, 5.00 points lost' in small.summary

def test_metrics_keep_their_units(monkeypatch):
    "A mean absolute error is no percentage, and what it may lose is in its unit"
    learn = learner('lenet5')
    small = compress(learn, params=.5, how='uniform')
    for name,says in dict(mae='mae on the validation set 0.31 → 0.35, 0.04 worse', r2_score='0.31 → 0.35, 0.04 better', dice='31.00 % → 35.00 %, 4.00 points won').items():
        small.table = small.table.iloc[:,:5].assign(**{name: [.31,.35]})
        assert says in small.summary and '%,' not in small.summary.split('mae on')[-1][:30]
    learn.metrics = L(AvgMetric(mae))
    monkeypatch.setattr(compressing, '_compressed', lambda learn, limits, **kw: SimpleNamespace(
        table=pd.DataFrame(dict(macs=[1000,int(1000*limits['macs'])], valid_loss=[0,0], mae=[4.,4+2*(limits['macs']<.3)])), f=limits['macs']))
    assert .3<=learn.compress_to(max_drop=1.5, tries=6).f<.35
    with pytest.raises(ValueError, match='in the unit of mae'): learn.compress_to(max_drop=-1)

def test_a_drop_that_nothing_keeps(monkeypatch):
    monkeypatch.setattr(compressing, '_compressed', fake(lambda f: 5))
    with pytest.raises(ValueError, match='loses at most 0.01; the largest had 984 MACs and lost 0.0500'): learner('lenet5').compress_to(max_drop=.01)


# the variational way

@pytest.mark.parametrize('net', ['resnet8','lenet5'])
def test_noise_decides(net, monkeypatch):
    "The budget is met, epochs are shared by gates and what is left, and the channels of the largest log α are those that go"
    learn,seen,counter = learner(net, n_epoch=1),{},Counts()
    monkeypatch.setattr(compressing, 'settled', lambda o: seen.setdefault('cut', settled(o)))
    small = compress(learn, macs=.5, how='variational', n_epoch=3, cbs=counter)
    assert .4*small.table.macs['dense'] < small.table.macs['cut'] <= .5*small.table.macs['dense'] and counter.epochs==3
    assert not variational_layers(small.model) and [*small.table.index]==['dense','cut','distilled'] and small.n_epoch==3
    plain,criterion,without = seen['cut']
    worth = torch.cat([*scores(plain, criterion, by='channel').values()])
    gone = small.widths.before.sum()-small.widths.after.sum()
    order = worth.sort().values
    for name,v in scores(plain, criterion, by='channel').items():
        left = small.widths.after[name]
        if left>1: assert v.sort().values[-left]>=order[gone-1]-1e-6      # no channel that stays is worth less than one that went
    assert without==[]

def test_where_gates_cannot_be():
    grouped = learner(Grouped())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        small = compress(grouped, params=.9, how='variational', n_epoch=2)
    assert small.widths.index.tolist()!=[] and 'a' not in small.widths.index      # read by a grouped convolution: no gate, so it stays
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a,self.fc,self.head = nn.Linear(64, 16),nn.Linear(16, 16),nn.Linear(16, 10)
        def forward(self, x): return self.head(self.fc(self.fc(self.a(x.flatten(1))).relu()))
    with pytest.raises(ValueError, match="runs more than once.*how='sensitivity' needs no gates"): compress(learner(Twice()), params=.9, how='variational', n_epoch=2)

def test_the_network_goes_where_the_data_are():
    learn = learner('lenet5')
    learn.dls.device = 'meta'
    check_data(learn)
    assert learn.model.fc1.weight.device.type=='meta'



# refusals

@pytest.mark.parametrize('kwargs,said', [
    (dict(), 'no budget is given'), (dict(macs=0), 'macs is 0, expected'), (dict(params=1.5), 'params is 1.5, expected'),
    (dict(macs='20X'), 'Units of macs are k, M, G and %'), (dict(macs='20M'), 'no limit: the network has'), (dict(macs=.5, how='uniforms'), "how is 'uniforms'"),
    (dict(macs=.5, update_bn=-1), 'update_bn is -1'), (dict(macs=.5, update_bn='x'), "update_bn is 'x'"), (dict(macs=.5, lr=-1), 'lr is -1'), (dict(macs=.5, lr='x'), "lr is 'x'"),
    (dict(macs=.5, steps=0), 'steps is 0'), (dict(macs=.5, n_epoch=-1), 'n_epoch is -1'), (dict(macs=.5, round_to=0), 'round_to is 0'),
    (dict(macs=.5, max_drop=.01), 'contradict'), (dict(max_drop=-1), 'max_drop is -1'), (dict(max_drop=True), 'max_drop is True'),
    (dict(max_drop=1.5), 'For 1.5 points write 0.015'), (dict(max_drop=.5), 'For 0.5 points write 0.005'),
    (dict(macs=.5, how='variational', n_epoch=1), 'trains gates before the cut'), (dict(macs=.5, how='variational', n_epoch=2, steps=2), 'cuts once'),
    (dict(macs=.5, how='variational', n_epoch=2, criterion='taylor'), 'goes by log α'),
    (dict(macs=.5, criterion='magntude'), 'Did you mean'), (dict(macs=.5, ignore='conv9'), 'conv9'), (dict(macs=1e-9), 'no group is emptied')])
def test_what_is_refused(kwargs, said):
    with pytest.raises(ValueError, match=said): learner('lenet5').compress_to(n_epoch=kwargs.pop('n_epoch', 0), n=64, show=False, **kwargs)

def test_samples_and_names_that_are_none():
    for n in (0,-5,'x',1.5):
        with pytest.raises(ValueError, match=f'n is {n!r}, expected a whole number'): learner('lenet5').compress_to(macs=.5, n=n)
    with pytest.raises(TypeError, match='compress_to takes no epochs, nor do distill and fit_one_cycle. Did you mean .n_epoch.'): learner('lenet5').compress_to(macs=.5, n_epoch=0, epochs=3)
    with pytest.raises(ValueError, match="fit is 'fit_one', expected the name of a fit method"): learner('lenet5').compress_to(macs=.5, fit='fit_one')

def test_learners_that_cannot(monkeypatch):
    learn = learner('lenet5')
    with pytest.raises(ValueError, match='no training data'): Learner(DataLoaders(), learn.model, loss_func=learn.loss_func).compress_to(macs=.5)
    for other in (seeded(data(), nn.Sequential(nn.Flatten(), nn.Linear(64,10))), seeded(per_item(), Two())):
        with pytest.raises(ValueError, match='prune_model.*can be taught'): other.compress_to(macs=.5)
    learn.metrics = L()
    with pytest.raises(ValueError, match='needs a metric'): learn.compress_to(max_drop=.01)
    made = learner('lenet5', opt_func=OptimWrapper(opt=torch.optim.SGD(learn.model.parameters(), lr=.1)))
    with pytest.raises(ValueError, match='built by hand'): made.compress_to(macs=.5, how='uniform', n_epoch=0)

@pytest.mark.parametrize('given,said', [('1,5k', "'1,5k', expected"), ('20,5%', "'20,5%', expected"), ('1_000,00', 'expected a fraction'), ('0.5', 'A fraction is no text: macs=0.5')])
def test_numbers_that_read_in_two_ways(given, said):
    with pytest.raises(ValueError, match=said): read_limit('macs', given, 1e6)

def test_thousands_may_be_parted():
    assert [read_limit('macs', o, 1e7) for o in ('1,234,567', '1_234_567', '1,234.5k', '.5M', '12.5 %')]==[1234567, 1234567, 1234500, 5e5, 1.25e6]

def test_points_in_the_place_of_a_fraction_are_noticed(monkeypatch):
    monkeypatch.setattr(compressing, '_compressed', fake(lambda f: 0))
    with pytest.warns(UserWarning, match='allows 20 points.*write 0.002'): learner('lenet5').compress_to(max_drop=.2, tries=1)
    with pytest.raises(ValueError, match='tries is 0'): learner('lenet5').compress_to(max_drop=.01, tries=0)

def test_a_drop_where_no_budget_can_be_reached():
    with pytest.raises(ValueError, match='cannot be reached'): compress(learner('lenet5'), max_drop=.01, tries=1, round_to=64, how='uniform')


@pytest.mark.parametrize('ask', [lambda learn: learn.compress_to(macs=.5, n_epoch=0), sensitivity], ids=['compress_to','sensitivity'])
def test_in_the_middle_of_a_fit_it_is_refused_and_the_fit_goes_on(ask):
    said = []
    class Ask(Callback):
        def after_batch(self):
            if self.training and self.iter==1:
                with pytest.raises(RuntimeError, match='in the middle of a fit') as e: ask(self.learn)
                said.append(str(e.value))
    learn = learner(n_epoch=1, cbs=Ask())
    assert len(said)==1 and learn.recorder.losses[-1].isfinite()
