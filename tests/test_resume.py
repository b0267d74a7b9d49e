"What survives a kill, a damaged file, a full disk, a changed setting; what several processes write."
import json, random, re, resource, shutil, subprocess, sys, time, warnings
from collections import Counter, defaultdict, deque

import killed, pytest
import two_processes as ddp
from common import X, Y, data, quiet, same
from elsewhere import context, elsewhere, start
from kdnb.all import *
from kdnb.files import load_state,save_state

def content(path):
    "All that a run has written, without the times"
    res = {}
    for f in sorted(o for o in path.rglob('*') if o.is_file() and o.name!='.lock'):
        text = f.read_bytes() if f.suffix in ('.safetensors','.npz') else re.sub(r'"seconds": [\d.e-]+', '', f.read_text())
        res[str(f.relative_to(path))] = text.replace(str(path), 'run') if isinstance(text, str) else text
    return res

@pytest.mark.long
def test_killed_in_every_stage_again_and_again(tmp_path):
    kills = elsewhere(killed.kills, tmp_path, 0)
    assert sum(kills.values())>=12 and kills.keys()=={*killed.STAGES}, kills
    a,b = content(tmp_path/'whole'),content(tmp_path/'killed')
    assert a.keys()==b.keys()
    for k in a: assert a[k]==b[k], k

class Stop(Exception): pass
class StopAt(Callback):
    def __init__(self, epoch): self._at = epoch
    def before_batch(self):
        if self.training and self.epoch==self._at and self.iter==3: raise Stop('here')

class Memory(Callback):
    "Counts in public, as a user's callback may"
    def __init__(self): self.n,self.seen = 0,[]
    def after_batch(self):
        if self.training: self.n += 1
    def after_epoch(self): self.seen.append((self.epoch, self.n, float(self.learn.smooth_loss)))

class Half(MixedPrecision):
    "fastai's, on the CPU, with a scale so large that the first steps are skipped"
    def before_fit(self):
        super().before_fit()
        self.autocast,self.learn.scaler = torch.autocast('cpu', torch.float16),torch.amp.GradScaler('cpu', init_scale=2.**24, growth_interval=5)
    def after_batch(self):
        if self.training: self.scales.append(self.scaler.get_scale())

RICH = {
    'dropout and MixUp': lambda: (dict(), [MixUp()]),
    'accumulation': lambda: (dict(), [GradientAccumulation(300)]),
    'fastai Adam': lambda: (dict(opt_func=Adam, moms=(.9,.8,.9)), []),
    'lookahead': lambda: (dict(opt_func=ranger), []),
    'SGD and weight decay': lambda: (dict(opt_func=SGD, wd=.1), [GradientClip(.1)]),
    'gradual pruning': lambda: (dict(), [Pruner(.8, schedule='gradual', rounds=5)]),
    'early stopping': lambda: (dict(), [EarlyStoppingCallback(patience=3, min_delta=.5)]),
    'scheduled on plateau': lambda: (dict(), [ReduceLROnPlateau(patience=1, min_delta=.5)]),
    'half precision': lambda: (dict(), [Half()])}

def training(path, kind, stop, fit='fit_one_cycle'):
    set_seed(3, reproducible=True)
    dls = image_dls('digits', bs=128, pad=1, n_per_class=50)
    dls.train.rng = random.Random(0)
    model = nn.Sequential(nn.Conv2d(1,6,3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(.3), nn.Linear(216,10))
    kwargs,cbs = RICH[kind]()
    learn,memory = Learner(dls, model, metrics=accuracy, **kwargs),Memory()
    with learn.no_bar(),learn.no_logging(): getattr(learn, fit)(5, 5e-3, cbs=[*cbs, memory, StopAt(stop), Checkpoint(path)])
    return learn,memory

@pytest.mark.parametrize('kind', RICH)
def test_a_training_goes_on_exactly(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, 'share', None)
    whole,seen = training(tmp_path/'whole', kind, -1)
    for stop in (1,3):
        try: training(tmp_path/'killed', kind, stop)
        except Stop: pass
    again,seen_again = training(tmp_path/'killed', kind, -1)
    a,b = tensors_in(whole.model),tensors_in(again.model)
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert seen.seen==seen_again.seen and whole.recorder.values==again.recorder.values
    assert whole.recorder.lrs==again.recorder.lrs and torch.equal(torch.stack(list(whole.recorder.losses)), torch.stack(list(again.recorder.losses)))

def test_two_fits_in_one_method(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, 'share', None)
    whole,_ = training(tmp_path/'whole', 'fastai Adam', -1, 'fine_tune')
    with pytest.raises(Stop): training(tmp_path/'killed', 'fastai Adam', 2, 'fine_tune')
    again,_ = training(tmp_path/'killed', 'fastai Adam', -1, 'fine_tune')
    assert all(torch.equal(p, q) for p,q in zip(whole.model.parameters(), again.model.parameters()))

def test_a_checkpoint_that_stays_keeps_trainings_alone(tmp_path, monkeypatch):
    "With a search for a learning rate, predictions and validations before and between two fits"
    monkeypatch.setattr(Checkpoint, 'share', None)
    def go(n):
        set_seed(0)
        learn = Learner(image_dls('digits', bs=256), mlp(in_shape=(1,8,8), hidden=9), cbs=Checkpoint(tmp_path), path=tmp_path)
        with learn.no_bar(),learn.no_logging():
            for i in range(n):
                learn.validate()
                learn.lr_find(num_it=3, show_plot=False)
                learn.get_preds()
                learn.fit(2, 1e-3)
            learn.validate()
        return learn,{str(f.relative_to(tmp_path)): f.stat().st_mtime_ns for f in tmp_path.rglob('epoch-*')}
    learn,files = go(2)
    assert sorted(files)==[f'fit{i}/epoch-0000{j}.safetensors' for i in (0,1) for j in (0,1)]
    again,files_again = go(2)
    assert files_again==files and all(torch.equal(p, q) for p,q in zip(learn.model.parameters(), again.model.parameters()))     # nothing was trained anew
    learn.dls.train.dataset.x = learn.dls.train.dataset.x*float('nan')
    with pytest.raises(FloatingPointError): quiet(learn, 1)

class Private(Callback):
    "Keeps all that matters in private: counts, averages, generators, collections; and what is made anew"
    def __init__(self, folder):
        self._n,self._far,self._file,self._f = 0,{},Path(folder)/'0',lambda x: x
        self._dice,self._coin,self._die,self._old = random.Random(1),np.random.default_rng(1),torch.Generator(),np.random.RandomState(1)
        self._last,self._odd,self._by,self._count = deque(maxlen=3),set(),defaultdict(list),Counter()
        self._array,self._temperature = np.zeros(2),nn.Parameter(torch.ones(1))
        self._opt,self._cache = torch.optim.SGD([self._temperature], .1),torch.zeros(20_000_000, dtype=torch.uint8)
    def before_fit(self): self._params,self._hook = list(self.model.parameters()),self.model.register_forward_hook(lambda *a: None)
    def after_fit(self): self._hook.remove()
    def before_batch(self):
        if not self.training: return
        noise = self._dice.random()+self._coin.random()+torch.rand((), generator=self._die).item()+self._old.rand()
        self.learn.xb = (self.x*(1+.01*noise+.01*self._n+.01*sum(self._last)+.01*len(self._odd)+.01*self._array.sum())*self._temperature.item(),)
        self._n += 1; self._last.append(noise); self._by[self._n%3].append(noise); self._count[self._n%2] += 1
        if self._n%7==0: self._odd.add(self._n)
        self._array[self._n%2] += .1
        self._file = self._file.with_name(str(len(self._by[0])))
        self._temperature.grad = torch.full((1,), .01)
        self._opt.step()
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.learn.loss_grad + .01*sum(p.abs().sum() for p in self._params)
    def after_step(self):
        for i,p in enumerate(self._params): self._far[i] = .9*self._far.get(i, 0) + .1*p.detach(); p.data.lerp_(self._far[i], .01)

def privately(path, stop, cb):
    set_seed(0, reproducible=True)
    dls = image_dls('digits', bs=512)
    dls.train.rng = random.Random(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn = Learner(dls, mlp(in_shape=(1,8,8), hidden=8))
        with learn.no_bar(),learn.no_logging(): learn.fit(4, 1e-2, cbs=[Checkpoint(path), cb, StopAt(stop)])
    return learn,[str(o.message) for o in said if 'do not hold' in str(o.message)]

class StopSoon(StopAt):
    def before_batch(self):
        if self.training and self.epoch==self._at: raise Stop('here')

def test_private_data_of_callbacks_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, 'share', None)
    monkeypatch.setitem(globals(), 'StopAt', StopSoon)
    whole,said = privately(tmp_path/'whole', -1, a := Private(tmp_path))
    assert not said                                    # functions, hooks, parameters, a cache that does not change: nothing of them is lost
    for stop in (1,3):
        with pytest.raises(Stop): privately(tmp_path/'killed', stop, Private(tmp_path))
    assert max(f.stat().st_size for f in (tmp_path/'killed').rglob('*.safetensors'))<1_000_000
    again,_ = privately(tmp_path/'killed', -1, b := Private(tmp_path))     # another setting in private, `_at`, is not overwritten
    for p,q in zip(whole.model.parameters(), again.model.parameters()): assert torch.equal(p, q)
    for k in ('_n','_file','_last','_odd','_by','_count'): assert getattr(a, k)==getattr(b, k) and type(getattr(a, k)) is type(getattr(b, k)), k
    assert torch.equal(a._temperature, b._temperature) and b._opt.param_groups[0]['params'][0] is b._temperature and b._last.maxlen==3

class Opaque(Callback):
    def __init__(self, folder): self._log,self._names,self._f,self._net = open(folder/'log', 'w'),iter('abcdefgh'),len,nn.Linear(1,1)
    def after_epoch(self): self._net.weight.data.add_(1.); next(self._names); self._n = torch.zeros(40_000_000, dtype=torch.uint8)
    def after_fit(self): self._log.close()

class Own(Opaque):
    def state_dict(self): return dict(mine=3)
    def load_state_dict(self, state): self.got = state

def test_what_cannot_be_kept_is_named_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, 'share', None)
    monkeypatch.setitem(globals(), 'StopAt', StopSoon)
    (said,) = privately(tmp_path/'a', -1, Opaque(tmp_path))[1]
    for o in ('_log of Opaque (TextIOWrapper)','_names of Opaque (str','_net of Opaque (Linear)','_n of Opaque (40 MB)'): assert o in said
    assert '_f of' not in said and '/a' not in said
    with pytest.raises(Stop): privately(tmp_path/'b', 2, Own(tmp_path))
    learn,said = privately(tmp_path/'b', -1, own := Own(tmp_path))
    assert own.got==dict(mine=3) and not said

def test_a_checkpoint_of_before_private_data_was_kept_is_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, 'share', None)
    monkeypatch.setitem(globals(), 'StopAt', StopSoon)
    with pytest.raises(Stop): privately(tmp_path/'a', 2, Private(tmp_path))
    for f in (tmp_path/'a'/'fit0').iterdir():
        state = load_state(f)
        state['callbacks'] = [(n, {k: v for k,v in kept.items() if k[0]!='_'}) for n,kept in state['callbacks']]
        save_state(f, state)
    learn,_ = privately(tmp_path/'a', -1, Private(tmp_path))
    assert learn.epoch==3

def small_run(path, lr=3e-3, seeds=1, stop=-1, width=30):
    dls = image_dls('digits', bs=128, n_per_class=50)
    run = Run(path, 'small', dls, seeds=seeds, show=False)
    for _ in run.each_seed():
        teacher = run.teacher('lenet300', 2, lr)
        student = run.fit('student', run.learner(run.network(mlp(in_shape=dls.in_shape, hidden=width))), 4, 1e-3,
                          cbs=[KnowledgeDistillation(teacher, KD(T=2), cache=run.cache), StopAt(stop)])
        run.value('agreement', agreement, teacher, student, dls.valid)
    return run.finish(student)

def stamps(path): return {f.name: f.stat().st_mtime_ns for f in (path/'stages').glob('*.json')}

def open_again(path): (path/'model.safetensors').unlink()      # the run counts as unfinished
def files(path): return {o.relative_to(path): o.read_bytes() for o in path.rglob('*') if o.is_file() and o.name!='.lock'}

def test_what_is_done_is_not_done_again_and_what_follows_a_change_is(tmp_path):
    path = tmp_path/'run'
    small_run(path)
    first,whole = stamps(path),files(path)
    small_run(path)
    assert stamps(path)==first and files(path)==whole
    open_again(path)
    with pytest.warns(UserWarning, match="'student' is trained again: another network.") as said: small_run(path, width=20)   # the student alone
    assert len([o for o in said if 'trained again' in str(o.message)])==1
    second = stamps(path)
    assert second['teacher-seed0.json']==first['teacher-seed0.json'] and second['student-seed0.json']!=first['student-seed0.json']
    open_again(path)
    with pytest.warns(UserWarning, match="'teacher' is trained again: lr is 0.002, was 0.003.") as said: small_run(path, lr=2e-3, width=20)  # and so the student
    assert any("'student' is trained again: another callback KnowledgeDistillation." in str(o.message) for o in said)
    third = stamps(path)
    assert third['teacher-seed0.json']!=second['teacher-seed0.json'] and third['student-seed0.json']!=second['student-seed0.json']
    small_run(path, lr=2e-3, width=20, seeds=2)     # a seed more: what is done stays
    assert {k: v for k,v in stamps(path).items() if 'seed0' in k}==third and len(stamps(path))==4
    open_again(path)
    with pytest.warns(UserWarning, match="'student' of seed 1 is trained again: another callback StopAt"):
        small_run(path, lr=2e-3, width=20, seeds=2, stop=-2)       # a callback that is set otherwise
    assert all(v!=third.get(k) for k,v in stamps(path).items() if 'student' in k)

def test_a_finished_run_is_never_overwritten(tmp_path):
    "Settings, data, seeds, name of the data: what differs is said, and nothing is written"
    path,dls = tmp_path/'run',data()
    def go(dls=dls, data='mine', seeds=1, force=False, path=path, lr=1e-3, epochs=1, extra=False, keep='student', **settings):
        run = Run(path, 'own', dls, data, seeds, force, False, **dict(lr=1e-3, nested=dict(a=1, b=(1,2))) | settings)
        for _ in run.each_seed(): run.fit('student', run.learner(run.network('lenet300')), epochs, lr)
        if extra: run.enter('more', run.network('lenet300'))
        run.value('half', len, [1]*epochs)
        run.exhibit('e', 'table', pd.DataFrame(dict(a=[1.5])), 'E')
        return run.finish(run.models[keep])
    go().report()
    whole = files(path)
    other = data(test=(X[:50],Y[:50]))
    fewer,labels,batches = from_arrays(X[:150], Y[:150]),from_arrays(X, Y.flip(0)),data(bs=32)
    for says,kwargs in [('lr is 0.01, was 0.001', dict(lr=.01, settings=None)), ("data is 'yours', was 'mine'", dict(data='yours')),
                        ('training set has', dict(dls=fewer)), ('the training set has other images, labels or transforms', dict(dls=labels)),
                        ('the training set has batches of 32, had 64', dict(dls=batches)), ('there is a test set', dict(dls=other)),
                        ('seeds are 1, were 0', dict(seeds=(1,))), ('T is 5, was 4', dict(T=5)), ("a is 2, was 1", dict(nested=dict(a=2, b=(1,2)))),
                        ("stage 'student' is made from other things (epochs is 2, was 1", dict(epochs=2)), ("there is a new stage 'more'", dict(extra=True))]:
        if 'T' in kwargs: go(path=tmp_path/'T', T=4); kwargs['path'] = tmp_path/'T'
        if kwargs.pop('settings', 0) is None: kwargs['lr'] = .01
        with pytest.raises(ValueError, match=re.escape(says)) as e: go(**kwargs)
        assert 'Choose another folder, or begin anew with force=True.' in str(e.value), says
        assert files(path)==whole, says
    go()
    assert files(path)==whole and Record(path).table().equals(go().table())
    go(seeds=2)                                                    # grows
    assert Record(path).seeds==(0,1) and load_model(path/'model.safetensors')
    assert (path/'model.safetensors').read_bytes()==whole[Path('model.safetensors')]
    with pytest.raises(ValueError, match='seeds are 0, were 0, 1'): go()
    go(force=True, lr=.01)
    assert Record(path).seeds==(0,)

def own_recipe(path, dls, last=None, sparsity=.5, also=()):
    run = Run(path, 'own', dls, show=False)
    s = run.fit('student', run.learner(run.network('lenet5_caffe')), 1, 3e-3)
    p = run.fit('pruned', run.learner(s), 1, 3e-3, cbs=[Pruner(sparsity), *also], of=s)
    if last: last(run)
    return run.finish(p)

def test_a_call_that_fails_leaves_the_record_as_it_was(tmp_path):
    path,dls = tmp_path/'run',data(bs=32)
    run = own_recipe(path, dls)
    run.report()
    whole = files(path)
    def fails(run): raise RuntimeError('no')
    with pytest.raises(RuntimeError): own_recipe(path, dls, fails)
    with pytest.raises(ValueError, match="stage 'pruned' is made from other things .another callback Pruner"): own_recipe(path, dls, sparsity=.6)
    assert files(path)==whole
    open_again(path)
    whole = files(path)
    with pytest.raises(RuntimeError): own_recipe(path, dls, fails)          # an unfinished one, too
    assert files(path)==whole
    with pytest.raises(Stop),pytest.warns(UserWarning, match='trained again: a new callback StopAt'): own_recipe(path, dls, also=[StopAt(0)])
    assert [o['name'] for o in Record(path).stages]==['student','pruned']

class Shrinks(Callback):
    "Ends with fewer channels"
    def after_fit(self):
        prune_model(self.learn.model, .5, data=self.dls, by='channel')
        self.learn.model = shrink(self.learn.model, self.dls).train()

class ShrinksInside(Callback):
    "Ends with fewer channels in the middle of training, and masks on what is left"
    def before_epoch(self):
        if self.epoch==1 and self.training is not None:
            prune_model(self.learn.model, .5, data=self.dls, by='channel')
            self.learn.shrink()
            prune_model(self.learn.model, .3)

def variational(run): return run.learner(to_variational(run.network('lenet5_caffe'), run.dls))
ENDS = {'masks': lambda run: (run.learner(run.network('lenet5_caffe')), [Pruner(.5)]),
        'masked channels': lambda run: (run.learner(run.network('lenet5_caffe')), [Pruner(.5, by='channel')]),
        'masks that were there': lambda run: (run.learner(prune_model(run.network('lenet5_caffe'), .3)), [Pruner(.6)]),
        'fewer channels': lambda run: (run.learner(run.network('lenet5_caffe')), [Shrinks()]),
        'fewer channels and masks': lambda run: (run.learner(run.network('resnet8')), [ShrinksInside()]),
        'variational': lambda run: (variational(run), [VariationalSparsifier()]),
        'SimKD': lambda run: (run.learner(m := run.network('resnet8')), [KnowledgeDistillation(t := run.network('resnet14'), named_term('SimKD', m, t, run.dls))]),
        'heads': lambda run: (run.learner(m := run.network('resnet8')), [KnowledgeDistillation(t := run.network('resnet14'), named_term('VID', m, t, run.dls)), Pruner(.5)])}

@pytest.mark.long
@pytest.mark.parametrize('kind', ENDS)
@pytest.mark.filterwarnings('ignore:this sparsity would empty')
def test_whatever_a_stage_ended_with_is_read(kind, tmp_path, monkeypatch):
    def go():
        run = Run(tmp_path/'run', 'own', data(), show=False)
        learn,cbs = ENDS[kind](run)
        model = run.fit('stage', learn, 2, 1e-3, cbs=cbs)
        return model,accuracy_on(model, run.dls.valid)
    model,acc = go()
    monkeypatch.setattr(Run, '_train', lambda *args: pytest.fail('something is trained'))
    again,acc_again = go()
    a,b = ({k: v for k,v in tensors_in(o).items() if not k.startswith(HEADS)} for o in (model, again))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a) and acc==acc_again
    assert model.state_dict().keys()==again.state_dict().keys() and not again.training

def test_a_stage_s_network_is_not_trained_on_by_the_next(tmp_path):
    run = own_recipe(tmp_path/'run', data())
    assert not masks(run.models['student']) and run.stages[0]['test_accuracy']==accuracy_on(run.models['student'], run.dls.valid)

def module(code):
    import types
    m = types.ModuleType('users_own')
    sys.modules['users_own'] = m
    exec('from kdnb.all import *\n'+code, m.__dict__)
    return m

@pytest.mark.parametrize('change', [('x*K', 'x*K+1'), ('K = 2', 'K = 3'), ('k = 1', 'k = 4'), ('return half(', 'return -half('), ('x*y', 'x/y')])
def test_code_of_terms_and_criteria_is_part_of_what_a_stage_is_made_from(change):
    code = """
K = 2
def half(x): return x*K
class Times:
    def of(self, x, y): return x*y
class Own(LogitTerm):
    k = 1
    @property
    def scaled(self): return half(self.k)
    def __call__(self, o): return half(o.z_s.mean())*Times().of(1, self.scaled)
def worth(s): return half(s.weights)
"""
    def marks(code): return fingerprint(KnowledgeDistillation(nn.Identity(), module(code).Own()*.5)),fingerprint(module(code).worth)
    a,b,c = marks(code),marks(code),marks(code.replace(*change))
    assert a==b and a[0]!=c[0] and (a[1]!=c[1] or change[0] in ('k = 1','x*y'))

def test_a_criterion_that_is_named_counts_with_its_code(tmp_path, monkeypatch):
    dls = data()
    monkeypatch.setitem(criteria, 'own', lambda s: s.sum({k: w.abs() for k,w in s.weights.items()}))
    def go():
        run = Run(tmp_path/'run', 'own', dls, show=False)
        return run.fit('pruned', run.learner(run.network('lenet300')), 1, 1e-3, cbs=Pruner(.5, 'own'))
    a = go()
    monkeypatch.setitem(criteria, 'own', lambda s: s.sum({k: -w.abs() for k,w in s.weights.items()}))
    with pytest.warns(UserWarning, match='trained again: another callback Pruner'): b = go()
    assert not same(masks(a), masks(b))

def test_a_record_from_before_is_read(tmp_path):
    "Without what later ones know: sets, spreads of latencies, what stages are made from"
    path,dls = tmp_path/'run',data()
    own_recipe(path, dls)
    o = json.loads((path/'run.json').read_text())
    for k in ('sets','latency_spread'): del o[k]
    (path/'run.json').write_text(json.dumps(o))
    for f in (path/'stages').glob('*.json'):
        row = json.loads(f.read_text())
        del row['made_from']
        f.write_text(json.dumps(row))
    r = Record(path)
    assert r.latency_spread=={} and 'latency_ms' in r.stages[0] and 'latency' in str(report(path))
    assert own_recipe(path, dls).stages[1]==r.stages[1]
    with pytest.raises(ValueError, match="'pruned' is made from other things .something else"): own_recipe(path, dls, sparsity=.6)

def with_forward(f):
    "A network of an own class, whose `forward` uses `f`"
    class Net(nn.Module):
        def __init__(self, scale=1.):
            super().__init__()
            self.a,self.b,self.scale = nn.Linear(64,20),nn.Linear(20,10),scale
        def forward(self, x): return self.b(f(self.scale*self.a(x.flatten(1))))
    return Net

def seeded(f, *args, **kwargs): set_seed(0); return f(*args, **kwargs)

def test_a_network_is_known_by_its_code_and_its_settings(tmp_path):
    own,dls = with_forward(torch.relu),image_dls('digits', bs=256)
    marks = [fingerprint(seeded(f, *args)) for f,args in ((own,()), (with_forward(torch.sin),()), (own,(-3.,)))]
    assert len({*marks})==3 and fingerprint(seeded(with_forward(torch.relu)))==marks[0]
    assert fingerprint(nn.CrossEntropyLoss())!=fingerprint(nn.CrossEntropyLoss(label_smoothing=.2))
    for make in (own, lambda: create('resnet8', dls), lambda: to_variational(create('lenet300', dls), dls)):
        model,like = seeded(make),make()
        mark = fingerprint(model)
        assert fingerprint(model.eval())==fingerprint(deepcopy(model))==mark
        quiet(Learner(dls, model), 1, cbs=[KnowledgeDistillation(create('lenet300', dls), KD())])
        set_tensors(like, tensors_in(model))
        assert fingerprint(model)==fingerprint(like)!=mark
    curves = []
    for f in (torch.relu, torch.sin):
        run = Run(tmp_path/'run', 'own', dls, show=False)
        run.fit('net', run.learner(run.network(seeded(with_forward(f)))), 1, 1e-2)
        curves.append(run.stages[0]['curves'])
    assert curves[0]!=curves[1]

def test_a_callback_is_known_by_its_code():
    def own(k):
        class Own(Callback):
            def after_loss(self): self.learn.loss_grad = self.learn.loss_grad*k
        return Own()
    assert fingerprint(own(2))==fingerprint(own(2))!=fingerprint(own(3))

def test_data_are_known_by_their_labels(tmp_path):
    x,y = torch.rand(40,1,8,8),torch.arange(40)%4
    def dsets(ds): return DataLoaders.from_dsets(ds, ds, bs=20)
    for i,o in enumerate(x): Image.fromarray((255*o[0]).byte().numpy()).save(tmp_path/f'{i}.png')
    files,kwargs = get_image_files(tmp_path).sorted(),dict(num_workers=0, seed=1, bs=8)
    def of(ys): return dict(zip([f'{i}.png' for i in range(40)], map(int, ys)))
    make = [lambda ys: dsets(torch.utils.data.TensorDataset(x, ys)), lambda ys: dsets([*zip(x, ys)]),
            lambda ys: ImageDataLoaders.from_path_func(tmp_path, files, lambda f: of(ys)[f.name], **kwargs),
            lambda ys: ImageDataLoaders.from_df(pd.DataFrame(of(ys).items()), tmp_path, **kwargs)]
    for f in make:
        dls,like,other = f(y),f(y.clone()),f(y.flip(0))
        drawn = torch.get_rng_state()
        mark = fingerprint(dls)
        assert torch.equal(torch.get_rng_state(), drawn) and fingerprint(like)==mark!=fingerprint(other)
        dls.train.one_batch(), dls.valid.one_batch()
        assert fingerprint(dls)==mark

def test_a_damaged_checkpoint_is_said_and_the_one_before_used(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, 'share', None)
    whole = small_run(tmp_path/'whole')
    with pytest.raises(Stop): small_run(tmp_path/'run', stop=2)
    newest = sorted((tmp_path/'run'/'checkpoints').rglob('epoch-*'))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    dls = image_dls('digits', bs=256)
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged.*Training 'student' goes on from the checkpoint before it"):
        with pytest.raises(Stop): small_run(tmp_path/'run', stop=2)
    state = tmp_path/'whole'/'stages'/'teacher-seed0.safetensors'
    before = state.read_bytes()
    state.write_bytes(before[:200])
    with pytest.warns(UserWarning, match='This stage is trained again'): small_run(tmp_path/'whole')
    assert state.read_bytes()==before

def fill(path, limit):
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    dls = image_dls('digits', bs=256)
    run = Run(path, 'small', dls, show=False)
    run.fit('first', run.learner(run.network('lenet300')), 2, 1e-3)
    run.fit('big', run.learner(run.network(mlp(in_shape=dls.in_shape, hidden=1024))), 1, 1e-3)

def test_a_full_disk_names_the_file_and_harms_nothing(tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount','-t','tmpfs','-o','size=3m','none',str(disk)], capture_output=True).returncode==0 if shutil.which('mount') else False
    try:
        with pytest.raises(OSError, match=r'big-seed0-\w+/fit0/epoch-00000.safetensors could not be written'):
            elsewhere(fill, disk/'run', None if mounted else 2_000_000)   # where mounting is not allowed, no file may be larger
        assert json.loads((disk/'run'/'run.json').read_text())['stages']==['first-seed0']
        assert load_state(disk/'run'/'stages'/'first-seed0.safetensors')['model'] and not list((disk/'run').rglob('.*.safetensors.*'))
    finally:
        if mounted: subprocess.run(['umount',str(disk)])

def test_other_folders_are_refused(tmp_path):
    dls = image_dls('digits')
    Run(tmp_path/'a', 'one', dls, show=False)
    with pytest.raises(ValueError, match='holds a run of one, this is two'): Run(tmp_path/'a', 'two', dls)
    o = json.loads((tmp_path/'a'/'run.json').read_text())
    (tmp_path/'a'/'run.json').write_text(json.dumps(o | dict(versions=o['versions'] | dict(kdnb='0.0.0'))))
    with pytest.raises(ValueError, match='was made by kdnb 0.0.0, this is'): Run(tmp_path/'a', 'one', dls)
    (tmp_path/'a'/'run.json').write_text('{')
    with pytest.raises(ValueError, match='is damaged'): Record(tmp_path/'a')
    with pytest.raises(FileNotFoundError, match='is not the folder of a run'): Record(tmp_path/'b')
    Run(tmp_path/'a', 'two', dls, force=True, show=False)
    for seeds in (0, -1, (), (1,1), (0,'1'), 1.5):
        with pytest.raises((ValueError,TypeError)): Run(tmp_path/'c', 'one', dls, seeds=seeds)

def hold(path, here):
    run = Run(path, 'small', image_dls('digits'), show=False)
    here.set()
    time.sleep(600)

def test_one_process_writes_a_run(tmp_path):
    p = start(hold, tmp_path/'run', here := context.Event())
    assert here.wait(60)
    with pytest.raises(ValueError, match='another process is writing the run'): Run(tmp_path/'run', 'small', image_dls('digits'))
    p.kill(); p.join()
    Run(tmp_path/'run', 'small', image_dls('digits'), show=False)     # a dead one holds nothing

def test_state_is_plain_and_exact(tmp_path):
    t = torch.randn(4,4)
    o = dict(z=[.1*i for i in range(50)], y=[torch.tensor(.1*i) for i in range(50)], a=[1,2.5,None,True,'ä',float('inf')], b=(t[1:3], t[:2], t.T), c={(1,2): np.arange(3.), 'k': L(1,[2])}, d=torch.tensor(3, dtype=torch.bfloat16),
             e=np.array(['x','yy']), f=pd.DataFrame([[1,.1],[2,.2]], index=pd.MultiIndex.from_tuples([('a',0),('b',1)], names=['n','s']), columns=['i','x']))
    r = load_state(save_state(tmp_path/'s', o))
    assert r['z']==o['z'] and r['y']==o['y'] and r['a']==o['a'] and all(torch.equal(x, y) for x,y in zip(r['b'], o['b'])) and torch.equal(r['d'], o['d'])
    assert (r['c'][1,2]==o['c'][1,2]).all() and r['c']['k']==o['c']['k'] and isinstance(r['c']['k'], L) and (r['e']==o['e']).all()
    pd.testing.assert_frame_equal(r['f'], o['f'])
    raw = (tmp_path/'s').read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        b = bytearray(raw)
        for i in rng.integers(len(b), size=3): b[i] = rng.integers(256)
        (tmp_path/'x').write_bytes(bytes(b[:rng.integers(1, len(b)+1)]))
        try: load_state(tmp_path/'x')
        except ValueError: pass           # and nothing else

@pytest.mark.long
def test_two_processes_give_the_table_of_one(two_processes, tmp_path):
    ddp.sparse_run(tmp_path/'one')
    one,two = Record(tmp_path/'one'),Record(two_processes/'vbgs_kd')
    a,b = one.stages,two.stages
    assert [o['name'] for o in a]==[o['name'] for o in b] and a[-1]['weights_kept']<.9
    for x,y in zip(a, b): assert abs(x['test_accuracy']-y['test_accuracy'])<.03 and abs(x['weights_kept']-y['weights_kept'])<.05, (x,y)
    loss = [[o['curves'][-1]['valid_loss'] for o in s[:2]] for s in (a,b)]
    np.testing.assert_allclose(*loss, rtol=1e-2)
    assert {str(f.relative_to(one.path)) for f in one.path.rglob('*')}=={str(f.relative_to(two.path)) for f in two.path.rglob('*')}
