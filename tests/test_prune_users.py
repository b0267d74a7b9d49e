"What users have pruned beyond convolutions and digits: recurrent layers, computed weights, several targets, trainings that end early."
import pickle, warnings

import pytest
from fastai.callback.schedule import *
from fastai.text.models.awdlstm import AWD_LSTM
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.spectral_norm import spectral_norm as spectral_norm_hook
from torch.nn.utils.weight_norm import weight_norm as weight_norm_hook
from common import StopAt, X, Y, data, quiet, same, seeded, state
from kdnb.all import *

quietly = pytest.mark.filterwarnings('ignore:Pruner', 'ignore:sparsity is a fraction', 'ignore:.*weight_norm.* is deprecated')

def net():
    set_seed(1)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1,4,3,stride=2), norm=nn.BatchNorm2d(4), act=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(36,10)))

def learner(model=None, dls=None, **kwargs): return seeded(dls or data(), model or net(), **kwargs)
def gone(model, names=None): return sum(int((m==0).sum()) for k,m in masks(model).items() if names is None or k in names)
def on(x, model): return x.to(next(model.parameters()).device)


# early ends, restored epochs, frozen epochs

class At(Callback):
    "Sparsity of the masks when each epoch ends, fit by fit"
    order = 55
    def __init__(self): self.fits = []
    def before_train(self):
        if self.epoch==0: self.fits.append([])
    def after_epoch(self): self.fits[-1].append(gone(self.model)/396)

class EndAfter(Callback):
    def __init__(self, n): self.n = n
    def after_epoch(self):
        if self.epoch+1==self.n: raise CancelFitException

class Metric(Callback):
    "Make `valid_loss` what it is told to be, an epoch at a time"
    order = 55      # behind the Recorder, before those that watch
    def __init__(self, losses): self.losses = losses
    def after_epoch(self): self.recorder.values[-1][1] = self.losses[self.epoch]

def said_by(f):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in said if str(o.message).startswith('Pruner')]

def test_an_early_end_is_said():
    learn = learner()
    said, = said_by(lambda: quiet(learn, 8, 1e-3, cbs=[Pruner(.75, schedule='gradual', end=.9), EarlyStoppingCallback(patience=1), Metric([1,2,3,4,5,6,7,8])]))
    now = gone(learn.model)/396
    assert now<.75 and all(o in said for o in ('EarlyStoppingCallback ended training in epoch 1 (of 8, from 0)', f'{now:.3g} are pruned', 'asked for: 0.75', 'prune_model(learn, 0.75)'))
    prune_model(learn, .75)
    assert gone(learn.model)==297

@pytest.mark.parametrize('by', ['weight','channel'])
@pytest.mark.parametrize('order', [-5, 61, 2000])
def test_a_restored_epoch_is_said(tmp_path, capsys, order, by):
    "Whatever comes first at the end of the fit"
    learn = learner(path=tmp_path)
    class Saves(SaveModelCallback): pass
    Saves.order = order
    saver = Saves() if order>50 else None
    if saver is None:
        class Saves(Callback):
            order = -5
            def after_epoch(self): self.epoch or self.learn.save('first')
            def after_fit(self): self.learn.load('first')
        saver = Saves()
    said, = said_by(lambda: quiet(learn, 4, 1e-3, cbs=[Pruner(.75, schedule=lambda t: t, by=by), saver, Metric([1,2,3,4])]))
    assert ('Saves has' if order>50 else 'a callback has')+' loaded weights from before the last cut' in said and 'asked for: 0.75' in said
    assert ('SaveModelCallback(at_end=True)' in said) and (f'{gone(learn.model)/396:.3g} are pruned' in said or by=='channel')
    assert ("by='channel'" in said)==(by=='channel')

def test_early_and_restored(tmp_path, capsys):
    learn = learner(path=tmp_path)
    said, = said_by(lambda: quiet(learn, 9, 1e-3, cbs=[Pruner(.9, schedule='iterative', end=.8), SaveModelCallback(), EarlyStoppingCallback(patience=2), Metric(range(1, 10))]))
    assert 'EarlyStoppingCallback ended' in said and 'SaveModelCallback has loaded' in said

@pytest.mark.parametrize('cbs,kw', [([], {}), ([EndAfter(3)], {}), ([EndAfter(1)], dict(schedule='one_shot')), ([StopAt(CancelBatchException())], {}), ([TerminateOnNaNCallback()], {})], ids=str)
def test_nothing_is_said_when_all_is_done(cbs, kw):
    learn = learner()
    n = len(learn.cbs)
    assert said_by(lambda: quiet(learn, 4, 1e-3, cbs=[Pruner(.75, **dict(schedule='gradual') | kw), *cbs]))==[]
    assert gone(learn.model)==297 and len(learn.cbs)==n and not any('Report' in type(o).__name__ for o in learn.cbs)

def test_what_a_loaded_epoch_has_is_what_is_said(tmp_path, capsys):
    "The file of an earlier, sparser training is loaded: nothing is missing"
    learn = learner(path=tmp_path)
    quiet(learn, 2, 1e-3, cbs=[Pruner(.8), SaveModelCallback(fname='best')])
    unmask(learn.model, list(masks(learn.model)))
    saver = SaveModelCallback(fname='best', reset_on_fit=False)
    saver.best = -1
    assert said_by(lambda: quiet(learn, 2, 1e-3, cbs=[Pruner(.5), saver]))==[] and gone(learn.model)==317

@pytest.mark.parametrize('error', [RuntimeError('boom'), KeyboardInterrupt()], ids=str)
def test_an_error_leaves_no_report(error):
    learn = learner(cbs=Pruner(.5, schedule='gradual'))
    n = len(learn.cbs)
    stop = StopAt(error)
    with pytest.raises(type(error)): quiet(learn, 2, 1e-3, cbs=stop)
    assert len(learn.cbs)==n
    assert said_by(lambda: quiet(learn, 2, 1e-3))==[] and len(learn.cbs)==n and gone(learn.model)==198

SPLIT = lambda m: [[*m.conv.parameters(), *m.norm.parameters()], list(m.fc.parameters())]

@pytest.mark.parametrize('splitter', [SPLIT, trainable_params], ids=['groups','one_group'])
@pytest.mark.parametrize('schedule', ['one_shot','gradual','iterative', lambda t: t])
@pytest.mark.parametrize('attached', [True,False])
def test_fine_tune_prunes_after_the_frozen_epochs(splitter, schedule, attached):
    learn,at,pruner = learner(splitter=splitter),At(),Pruner(.9, schedule=schedule, start=.25)
    if attached: learn.add_cb(pruner)
    assert said_by(lambda: quiet(learn, 4, 1e-3, fit='fine_tune', freeze_epochs=2, cbs=[at] if attached else [pruner, at]))==[]
    frozen,rest = at.fits
    assert frozen==[0,0] and len(rest)==4 and rest[0]==0 and rest==sorted(rest) and abs(rest[-1]-.9)<2e-3
    assert 'unfreeze' not in vars(learn) and not is_warmup(learn)
    quiet(learn, 1, 1e-3, fit='fit_one_cycle', cbs=Pruner(.95))
    assert gone(learn.model)==377

def test_an_error_in_fine_tune_leaves_the_learner_as_it_was():
    learn = learner(splitter=SPLIT)
    with pytest.raises(RuntimeError): quiet(learn, 2, 1e-3, fit='fine_tune', cbs=[Pruner(.5), StopAt(RuntimeError('boom'))])
    assert 'unfreeze' not in vars(learn)
    learn.unfreeze()
    assert gone(quiet(learn, 1, 1e-3, cbs=Pruner(.5)).model)==198

def test_early_stopping_in_fine_tune():
    learn = learner(splitter=SPLIT)
    said = said_by(lambda: quiet(learn, 6, 1e-3, fit='fine_tune', cbs=[Pruner(.9, schedule='gradual', end=.9), EarlyStoppingCallback(patience=1), Metric(range(9))]))
    assert len(said)==1 and 'EarlyStoppingCallback ended training in epoch 1 (of 6, from 0)' in said[0]

def test_frozen_layers_are_pruned_and_it_is_said():
    learn = learner(splitter=SPLIT)
    learn.freeze()
    with pytest.warns(UserWarning, match='1 of the 2 layers that are pruned are frozen'): quiet(learn, 1, 1e-3, cbs=Pruner(.5))
    assert gone(learn.model)==198

@pytest.mark.parametrize('rewind', ['lr','weights'])
def test_iterative_pruning_does_not_go_in_circles(tmp_path, capsys, rewind):
    "A callback brings back the dense network each round"
    learn = learner(path=tmp_path)
    mask_model(learn.model)
    learn.save('dense')
    class Back(Callback):
        def after_fit(self):
            if not hasattr(self.learn, 'gather_preds') and gone(self.model): self.learn.load('dense')
    with pytest.raises(ValueError, match='loaded weights of an earlier round'): quiet(learn, .5, n_epoch=1, lr=1e-3, rewind=rewind, cbs=Back(), fit='iterate')

def _iterate(self, *args, **kwargs): return iterative_prune(self, *args, **kwargs)
Learner.iterate = _iterate


# layers that are not linear

class Text(nn.Module):
    "Tokens are the pixels of a digit"
    def __init__(self, rnn=nn.LSTM, **kwargs):
        super().__init__()
        set_seed(2)
        self.emb,self.rnn = nn.Embedding(17, 6),rnn(6, 5, batch_first=True, **kwargs)
        with torch.no_grad(): n = self.rnn(torch.zeros(1,2,6))[0].shape[-1]
        self.fc = nn.Linear(n, 10)
    def forward(self, x): return self.fc(self.rnn(self.emb((x.flatten(1)*8).long().clamp(0, 16)))[0].mean(1))

class Attends(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        set_seed(2)
        self.inp,self.att,self.fc = nn.Linear(8,8),nn.MultiheadAttention(8, 2, batch_first=True, **kwargs),nn.Linear(8,10)
    def forward(self, x): x = self.inp(x[:,0]); return self.fc((x+self.att(x, x, x, need_weights=False)[0]).mean(1))

class Holds(Callback):
    "What is masked acts as zero, and its gradient is zero, at every step"
    order,n = 1000,0
    def before_step(self):
        self.n += 1
        for k,m in masks(self.model).items():
            path,_,name = k.rpartition('.')
            layer = unwrap(self.model).get_submodule(path)
            assert getattr(layer, name)[m==0].count_nonzero()==0 and (layer._parameters[name].grad is None or layer._parameters[name].grad[m==0].count_nonzero()==0), k

RNNS = dict(lstm={}, deep=dict(num_layers=2, dropout=.2), both=dict(bidirectional=True), proj=dict(proj_size=3), gru=dict(rnn=nn.GRU, num_layers=2, bidirectional=True),
            rnn=dict(rnn=nn.RNN), nobias=dict(bias=False))

@quietly
@pytest.mark.parametrize('kind', RNNS)
@pytest.mark.parametrize('criterion', ['magnitude','taylor','snip'])
def test_recurrent_layers(kind, criterion, tmp_path):
    "All their weights are pruned when asked, and stay so in training, copies, files, exports"
    learn = learner(Text(**RNNS[kind]), path=tmp_path)
    names = [f'rnn.{n}' for n,_ in learn.model.rnn.named_parameters() if n.startswith('weight')]
    quiet(learn, 2, 1e-2, cbs=[Pruner(.6, criterion, layers=[nn.RNNBase]), holds := Holds()])
    m,n = learn.model.eval(),sum(m.numel() for m in masks(learn.model).values())
    assert list(masks(m))==names and gone(m)==math.ceil(round(.6*n, 6)) and holds.n==6 and abs(sparsity(m, layers=nn.RNNBase)-gone(m)/n)<1e-9
    assert learn.recorder.values[-1][-1]==sparsity(m, layers='rnn')
    x = on(X[:7].float()/255, m)
    with torch.no_grad(): out = m(x)
    plain = Text(**RNNS[kind]).to(x.device).eval()
    plain.load_state_dict({k: v*masks(m)[k] if k in masks(m) else v for k,v in m.state_dict().items() if not k.endswith('_mask')})
    def right(o):
        with torch.no_grad(): assert torch.allclose(o.to(x.device).eval()(x), out, atol=1e-6)
    right(plain)
    quiet(learn, 1, 0.)                       # a step leaves a history in the layer
    twin = deepcopy(learn.model)
    assert gone(twin)==gone(m)
    learn.save('it')
    other = learner(Text(**RNNS[kind]), path=tmp_path).load('it')
    assert same(masks(other.model), masks(m))
    right(load_masked(Text(**RNNS[kind]), deepcopy(m.state_dict())))
    right(pickle.loads(pickle.dumps(m)))
    learn.export('it.pkl')
    again = load_learner(tmp_path/'it.pkl').model
    assert type(again.rnn) is type(plain.rnn) and not masks(again)
    right(again)
    right(fold(twin))
    assert type(twin.rnn) is type(plain.rnn) and twin.state_dict().keys()==plain.state_dict().keys() and abs(sparsity(twin, layers=nn.RNNBase)-gone(m)/n)<1e-9
    twin.train()(x).sum().backward()

@quietly
@pytest.mark.parametrize('kw', [{}, dict(kdim=8, vdim=8), dict(bias=False), dict(add_bias_kv=True)], ids=str)
def test_attention(kw):
    learn = learner(Attends(**kw))
    if 'kdim' in kw:      # torch uses one matrix unless the sizes differ
        learn.model.att = nn.MultiheadAttention(8, 2, batch_first=True, kdim=8, vdim=8)
    quiet(learn, 2, 1e-2, cbs=[Pruner(.5, layers='all'), Holds()])
    assert 'att.in_proj_weight' in masks(learn.model) and 'att.out_proj.weight' in masks(learn.model) and abs(sparsity(learn.model, layers='all')-.5)<1e-2
    m,x = learn.model.eval(),on(X[:5].float()/255, learn.model)
    with torch.no_grad(): assert torch.allclose(fold(deepcopy(m))(x), m(x), atol=1e-6)

@quietly
def test_attention_with_separate_projections_and_encoder():
    att = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    prune_model(att, .5, layers='all')
    assert list(masks(att))==['q_proj_weight','k_proj_weight','v_proj_weight','out_proj.weight']
    enc = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    prune_model(enc, .5, layers=[nn.MultiheadAttention, 'linear?'])
    x = torch.randn(2,3,8)
    with torch.no_grad(): fast = enc(x)
    assert torch.allclose(fast, enc(x), atol=1e-5) and torch.allclose(fast, fold(deepcopy(enc))(x), atol=1e-5)
    assert masks(enc).keys()=={'self_attn.in_proj_weight','self_attn.out_proj.weight','linear1.weight','linear2.weight'}

def test_the_number_says_of_what_it_is_a_fraction():
    big = Text()
    for f in (lambda: sparsity(big), lambda: prune_model(big, .5), lambda: quiet(learner(big), 1, 1e-3, cbs=Pruner(.5)), lambda: quiet(learner(big), .6, n_epoch=1, lr=1e-3, fit='iterate')):
        with pytest.warns(UserWarning, match=r"\d+ % of the parameters of this Text. Others are in layers of type Embedding, LSTM: layers='all'"): f()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sparsity(net()); sparsity(big, layers='all'); prune_model(big, .5, layers='all'); prune_model(net(), .5)

def test_layers_are_exactly_those_named():
    def pruned(**kwargs): return list(masks(prune_model(Text(), .5, **kwargs)))
    assert pruned(layers='fc')==['fc.weight'] and pruned(layers=[nn.Embedding])==['emb.weight'] and pruned(layers=['emb','fc'])==['emb.weight','fc.weight']
    assert pruned(layers='*_hh_*')==['rnn.weight_hh_l0'] and pruned(layers=nn.Module)==pruned(layers='all')==['emb.weight','rnn.weight_ih_l0','rnn.weight_hh_l0','fc.weight']
    assert pruned(layers='all', ignore=[nn.Embedding,'rnn.weight_hh_l0'])==['rnn.weight_ih_l0','fc.weight']
    m = Text()
    assert list(masks(prune_model(m, .5, layers=m.rnn)))==['rnn.weight_ih_l0','rnn.weight_hh_l0']

@quietly
def test_an_embedding_that_is_the_output_layer_too():
    class Tied(nn.Module):
        def __init__(self): super().__init__(); self.emb,self.out = nn.Embedding(10,8),nn.Linear(8,10); self.out.weight = self.emb.weight
        def forward(self, x): return self.out(self.emb(x.flatten(1).abs().long().clamp(max=9)).mean(1))
    learn = quiet(learner(Tied()), 2, 1e-2, cbs=[Pruner(.5, layers='all'), Holds()])
    assert torch.equal(learn.model.emb.weight, learn.model.out.weight) and sparsity(learn.model, layers='all')==.5
    assert list(prunable(Tied(), layers='all'))==['emb.weight']
    for o in ('emb','out',nn.Embedding,nn.Linear):
        with pytest.raises(ValueError, match='besides those that `ignore` names'): prunable(Tied(), o, 'all')

@quietly
def test_fastai_awd_lstm():
    "Its LSTM's weights are set anew for each batch, with dropout"
    model = AWD_LSTM(20, 6, 8, 2, hidden_p=0., input_p=0., embed_p=0., weight_p=.3)
    prune_model(model, .7, layers='all', ignore=model.encoder)
    assert any('weight_hh_l0_raw' in k for k in masks(model)) and any('weight_ih' in k for k in masks(model))
    x = torch.randint(0, 20, (3,5))
    model.train()(x).sum().backward()
    for k,m in masks(model).items():
        path,_,name = k.rpartition('.')
        assert model.get_submodule(path)._parameters[name].grad[m==0].count_nonzero()==0
    twin = deepcopy(model).eval()
    twin.reset(); model.eval().reset()
    with torch.no_grad(): a,b = model(x),twin(x)
    fold(twin); twin.reset()
    with torch.no_grad(): assert torch.allclose(a, b, atol=1e-6) and torch.allclose(a, twin(x), atol=1e-6)

class Ints(DataLoader):
    "Batches of tokens, of fastai's kind"
def text_dls():
    items = [(torch.randint(0, 17, (4,)), torch.tensor(i%3)) for i in range(24)]
    return DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8))

class Says3(nn.Module):
    "As fastai's text classifiers do: logits, and what the encoder said"
    def __init__(self): super().__init__(); self.emb,self.fc = nn.Embedding(17,6),nn.Linear(6,3)
    def forward(self, x): h = self.emb(x).mean(1); return self.fc(h),h,h
    def reset(self): pass

@quietly
@pytest.mark.parametrize('criterion', ['taylor','snip'])
def test_outputs_of_text_models(criterion):
    from fastai.callback.rnn import rnn_cbs
    learn = Learner(text_dls(), Says3(), loss_func=CrossEntropyLossFlat(), cbs=rnn_cbs())
    assert sparsity(quiet(learn, 1, 1e-3, cbs=Pruner(.5, criterion, layers='all')).model, layers='all')==.5


# computed weights

NORMS = dict(weight_norm=parametrizations.weight_norm, spectral_norm=parametrizations.spectral_norm, weight_norm_hook=weight_norm_hook, spectral_norm_hook=spectral_norm_hook)

def normed(norm):
    set_seed(3)
    m = nn.Sequential(norm(nn.Conv2d(1,6,3)), nn.ReLU(), norm(nn.Conv2d(6,6,3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(96,10)))
    for o in m.parameters(): o.data.mul_(1+.3*torch.rand_like(o))
    return m

@quietly
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('criterion', ['magnitude','taylor','snip'])
def test_computed_weights(norm, criterion):
    "By weight: exactly as many as asked for; zeros hold in training, copies and pickles; folded it says the same"
    m,x = normed(NORMS[norm]),X[:9].float()/255
    ws = {k: w.detach().clone() for k,w in prunable(m).items()}
    m(x.to(next(m.parameters()).device))
    learn = learner(m)
    quiet(learn, 2, 1e-2, cbs=Pruner(.5, criterion))
    m,x = learn.model.eval(),on(x, learn.model)
    n = sum(w.numel() for w in ws.values())
    assert gone(m)==math.ceil(n/2) and sparsity(m)>=.5 and all((w[masks(m)[k]==0]==0).all() for k,w in prunable(m).items())
    assert not any(torch.equal(w.cpu(), ws[k].cpu()*masks(m)[k].cpu()) for k,w in prunable(m).items())       # it did train
    learn.model.train()(x).sum().backward()
    with torch.no_grad(): out = m.eval()(x)
    for o in (deepcopy(m).eval(), fold(deepcopy(m)).eval(), pickle.loads(pickle.dumps(m)).eval()):
        with torch.no_grad(): assert torch.allclose(o(x), out, atol=2e-5)
    plain = fold(deepcopy(m))
    assert [type(o) for o in plain]==[nn.Conv2d,nn.ReLU,nn.Conv2d,nn.ReLU,nn.Flatten,nn.Linear] and not any(o._forward_pre_hooks for o in plain)
    assert set(plain.state_dict())=={f'{i}.{n}' for i in (0,2,5) for n in ('weight','bias')} and sparsity(plain)==sparsity(m)
    prune_model(m, .7)
    assert gone(m)==math.ceil(round(.7*n, 6))

@quietly
@pytest.mark.parametrize('norm', NORMS)
def test_a_look_changes_nothing_of_computed_weights(norm):
    "Scores and counts in training mode: not even the vectors of spectral_norm move"
    m,dls = normed(NORMS[norm]).train(),data()
    before = state(m)
    for criterion in ('magnitude','taylor','snip'): worth = scores(m, criterion, dls)
    sparsity(m); layer_sparsity(m); prunable(m)
    assert same(state(m), before) and not masks(m) and all(v.max()>0 for v in worth.values())

@quietly
@pytest.mark.parametrize('norm', NORMS)
def test_gradients_of_computed_weights(norm):
    "Scores equal those of the plain network with the same weights"
    m,dls = normed(NORMS[norm]).eval(),data()
    plain = fold(prune_model(normed(NORMS[norm]), 0.))
    assert not any(hasattr(o, 'parametrizations') for o in plain)
    for criterion in ('magnitude','taylor','snip','prue'):
        a,b = scores(m, criterion, dls),scores(plain, criterion, dls)
        assert a.keys()==b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-6) for k in a), criterion

@quietly
@pytest.mark.parametrize('norm', ['weight_norm','spectral_norm'])
def test_channels_of_computed_weights(norm):
    m = normed(NORMS[norm]).eval()
    prune_model(m, .5, data=data(), by='channel')
    x = X[:9].float()/255
    small = shrink(m, data())
    assert [small[0].out_channels,small[2].out_channels]==[3,3] and torch.allclose(small.eval()(x), m(x), atol=1e-4)

@quietly
def test_computed_weights_can_be_left_out():
    m = nn.Sequential(parametrizations.weight_norm(nn.Linear(4,4)), nn.Linear(4,4))
    assert masks(prune_model(m, .5, ignore=['0'])).keys()=={'1.weight'}

class OwnWay(nn.Linear):
    "A weight that a hook of one's own sets"
    def __init__(self, *args):
        super().__init__(*args)
        self.v = nn.Parameter(self.weight.detach().clone())
        del self.weight
        self.weight = self.v*2
        self.register_forward_pre_hook(lambda m,x: setattr(m, 'weight', m.v*2))

def test_what_nobody_can_follow_is_refused_by_name():
    m = nn.Sequential(OwnWay(4,4), nn.Linear(4,4))
    with pytest.raises(ValueError, match=r"0.weight is no parameter: OwnWay computes it .* Leave it out: ignore='0'"): prune_model(m, .5)
    assert not masks(m) and masks(prune_model(m, .5, ignore='0')).keys()=={'1.weight'}

def torch_pruned():
    set_seed(0)
    m = nn.Sequential(nn.Linear(8,16), nn.ReLU(), nn.Linear(16,4))
    prune.ln_structured(m[0], 'weight', .5, n=1, dim=0)
    prune.random_unstructured(m[0], 'weight', .25)       # on top: a container of both
    prune.l1_unstructured(m[0], 'bias', .25)
    return m

def test_masks_of_torch_are_seen():
    m,x = torch_pruned(),torch.randn(3,8)
    n = int((m[0].weight==0).sum())
    assert masks(m).keys()=={'0.weight','0.bias'} and abs(sparsity(m)-n/192)<1e-9 and layer_sparsity(m).nonzero['0']==128-n
    assert all(scores(m)['0.weight'][m[0].weight_mask==0].isneginf())
    out,p = m(x),m[0].weight_orig
    before = {k: v.clone() for k,v in masks(m).items()}
    prune_model(m, .6)
    assert gone(m, prunable(m))==math.ceil(.6*192) and all((masks(m)[k][v==0]==0).all() for k,v in before.items()) and m[0]._parameters['weight'] is p
    assert deepcopy(m)(x).shape==out.shape and list(m.state_dict())==['0.weight','0.bias','0.weight_mask','0.bias_mask','2.weight','2.bias','2.weight_mask']
    assert abs(m(x)-deepcopy(m)(x)).max()==0 and not fold(deepcopy(m))[0]._forward_pre_hooks
    small = shrink(fold(m), x)
    assert small[0].out_features<16 and torch.allclose(small(x), m(x), atol=1e-5)

def test_torch_s_own_functions_go_on_working():
    m,x = torch_pruned(),torch.randn(3,8)
    prune_model(m, .6)
    out = m(x)
    prune.remove(m[0], 'weight'); prune.remove(m[0], 'bias')
    assert torch.allclose(m(x), out) and masks(m).keys()=={'2.weight'} and not prune.is_pruned(m[0])

def test_what_torch_has_pruned_is_folded():
    m,x = torch_pruned(),torch.randn(3,8)
    out = m(x).detach()
    assert torch.allclose(fold(m)(x), out) and type(m[0]) is nn.Linear and set(m.state_dict())=={'0.weight','0.bias','2.weight','2.bias'}
    assert torch.allclose(shrink(m, x)(x), out, atol=1e-5) and not prune.is_pruned(m)

def _fit(m):
    items = [(torch.randn(8), torch.tensor(i%4)) for i in range(32)]
    learn = Learner(DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8)), m, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.remove_cb(ProgressCallback)
    return learn

@pytest.mark.parametrize('rewind', ['lr','weights'])
def test_iterative_pruning_goes_on_from_torch_s_masks(rewind):
    learn = _fit(torch_pruned())
    with learn.no_logging(): levels = iterative_prune(learn, .8, n_epoch=1, lr=1e-3, rewind=rewind)
    assert levels[0].sparsity>.3 and levels[-1].weights==192-math.ceil(.8*192)

@quietly
def test_masks_are_given_to_a_smaller_layer():
    "What `shrink` needs, of whatever kind the layers are"
    for old,new in ((nn.LSTM(3,4), nn.LSTM(3,4)), (parametrizations.weight_norm(nn.Linear(4,4)), nn.Linear(4,4))):
        prune_model(old, .5, layers='all')
        old.give_masks(new, old.own_masks())
        assert same(masks(new), masks(old)) and type(fold(new)) in (nn.LSTM,nn.Linear) and .45<sparsity(new, layers='all')<.55

@quietly
def test_a_weight_norm_that_is_removed_later():
    m = nn.Sequential(weight_norm_hook(nn.Linear(4,4)))
    prune_model(m, .5)
    out = m(torch.ones(4))
    nn.utils.remove_weight_norm(m[0])
    assert torch.allclose(m(torch.ones(4)), out) and sparsity(m)==.5 and type(fold(m)[0]) is nn.Linear

def test_a_state_dict_of_torch_s_masks(tmp_path):
    learn = learner(path=tmp_path)
    prune.l1_unstructured(learn.model.fc, 'weight', .5)
    learn.save('theirs')
    other = learner(path=tmp_path).load('theirs')
    assert gone(other.model)==180 and all(torch.equal(a, b) for a,b in zip(learn.get_preds()[0], other.get_preds()[0]))
    m = torch_pruned()
    other = load_masked(nn.Sequential(nn.Linear(8,16), nn.ReLU(), nn.Linear(16,4)), m.state_dict())
    x = torch.randn(3,8)
    assert torch.allclose(other(x), m(x)) and masks(other).keys()=={'0.weight','0.bias'}


# odd layers

class StepConv(nn.Conv2d):
    def __init__(self, *a, **k): super().__init__(*a, **k); self.step = nn.Parameter(torch.tensor([.05]))
    def forward(self, x):
        w = self.weight + ((self.weight/self.step).round()*self.step - self.weight).detach()
        return self._conv_forward(x, w, self.bias)
class LoRA(nn.Linear):
    def __init__(self, i, o): super().__init__(i, o); self.A,self.B = nn.Parameter(torch.randn(4,i)),nn.Parameter(torch.randn(o,4))
    def forward(self, x): return F.linear(x, self.weight+self.B@self.A, self.bias)
class Int8(nn.Linear):
    def __init__(self, i, o):
        super().__init__(i, o)
        self.scale,self.weight = nn.Parameter(torch.tensor(.01)),nn.Parameter(torch.randint(-100, 100, (o,i), dtype=torch.int8), requires_grad=False)
    def forward(self, x): return F.linear(x, self.weight*self.scale, self.bias)

def test_layers_with_parameters_of_their_own():
    m = nn.Sequential(StepConv(1,4,3), nn.ReLU(), nn.Flatten(), LoRA(144,10))
    learn = quiet(learner(m), 2, 1e-2, cbs=[Pruner(.5), Holds()])
    assert sparsity(m)==.5 and masks(m).keys()=={'0.weight','3.weight'} and type(fold(m)[0]) is StepConv

def test_empty_whole_number_and_frozen_weights():
    m = nn.Sequential(nn.Flatten(), nn.Linear(64,6), Int8(6,6), nn.Linear(6,0), nn.Linear(0,6), nn.Linear(6,10))
    for p in m[1].parameters(): p.requires_grad_(False)
    assert list(prunable(m))==['1.weight','5.weight'] and list(layer_sparsity(m).index)==['1','5','total']
    for criterion in ('magnitude','random','taylor','snip','prue'):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            learn = quiet(learner(deepcopy(m)), 1, 1e-2, cbs=Pruner(.5, criterion, scope='layer'))
        assert gone(learn.model)==222
    with pytest.raises(ValueError, match='has no linear or convolution layer'): prune_model(Int8(3,3))
    with pytest.raises(ValueError, match='no weight or bias of this network'): mask_model(Int8(3,3), {'weight': torch.ones(3,3)})

def test_layers_without_a_shape_are_refused():
    with pytest.raises(ValueError, match='1.weight has no shape yet .* Run the network on a batch first'): prune_model(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))

def test_a_layer_with_a_mask_of_its_own():
    class Own(nn.Linear):
        def __init__(self, *a): super().__init__(*a); self.register_buffer('weight_mask', torch.tril(torch.ones_like(self.weight)))
        def forward(self, x): return F.linear(x, self.weight*self.weight_mask, self.bias)
    m = nn.Sequential(Own(4,4), nn.Linear(4,4))
    with pytest.raises(ValueError, match="Own '0' has a buffer weight_mask of its own. Leave it out: ignore='0'"): prune_model(m, .5)
    assert masks(prune_model(m, .5, ignore='0')).keys()=={'1.weight'} and m[0].weight_mask.sum()==10


# targets

class TwoHeads(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(8,32),nn.Linear(32,2),nn.Linear(32,1)
    def forward(self, x): h = self.a(x).relu(); return self.b(h),self.c(h)

class Items(list): n_inp = 1
def two_targets(how=lambda y,z: (y,z)):
    set_seed(0)
    ds = Items([(o, *how((o[0]>0).long(), o[1:2])) for o in torch.randn(64,8)])
    return DataLoaders.from_dsets(ds, ds, bs=16, num_workers=0)
def two_losses(p, y, z): return F.cross_entropy(p[0], y) + F.mse_loss(p[1], z)

@pytest.mark.parametrize('criterion', ['taylor','snip'])
@pytest.mark.parametrize('how,loss', [(lambda y,z: (y,z), two_losses), (lambda y,z: (dict(y=y, z=z),), lambda p,t: two_losses(p, t['y'], t['z'])),
                                      (lambda y,z: ((y,z),), lambda p,t: two_losses(p, *t))], ids=['two','dict','tuple'])
def test_every_target_reaches_the_loss(criterion, how, loss):
    def head_gets_something(m): return scores_of(m)['c.weight'].max()>0
    def scores_of(m): return scores(m, criterion, two_targets(how), loss_func=loss)
    assert head_gets_something(TwoHeads())
    a,b = (quiet(Learner(two_targets(h), _two(), loss_func=l, opt_func=SGD), 1, 1e-3, cbs=Pruner(.5, criterion, start=.3)) for h,l in ((how,loss), (lambda y,z: (y,z), two_losses)))
    assert same(masks(a.model), masks(b.model))

def _two():
    set_seed(1)
    return TwoHeads()

def test_inputs_are_split_as_the_learner_splits_them():
    "`n_inp` of the loaders counts, also 2 inputs and 2 targets"
    class In2(TwoHeads):
        def forward(self, a, b): return super().forward(a+b)
    items = [(torch.randn(8), torch.randn(8), torch.tensor(i%2), torch.randn(1)) for i in range(32)]
    dls = DataLoaders(DataLoader(items, bs=16), DataLoader(items, bs=16))
    dls.n_inp = 2
    for criterion in ('taylor','snip'): assert sparsity(quiet(Learner(dls, In2(), loss_func=two_losses), 1, 1e-3, cbs=Pruner(.5, criterion)).model)==.5

@pytest.mark.parametrize('criterion', ['taylor','snip'])
def test_no_targets_is_said(criterion):
    items = [(torch.randn(8),) for i in range(32)]
    with pytest.raises(ValueError, match='needs targets, and the training set has none'): scores(nn.Linear(8,2), criterion, DataLoaders(DataLoader(items, bs=16), DataLoader(items, bs=16)))


# refused at the start

class Count(Callback):
    n = 0
    def after_batch(self): self.n += self.training

def no_scale(): return nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(144,10))
def no_norm(): return nn.Sequential(nn.Conv2d(1,4,3), nn.ReLU(), nn.Flatten(), nn.Linear(144,10))
def broken(s): return {k: w[:1] for k,w in s.weights.items()}

@pytest.mark.parametrize('fit', ['fit','fit_one_cycle','fine_tune'])
@pytest.mark.parametrize('make,kw,message', [
    (no_scale, dict(criterion='bn_scale', by='channel'), 'pass no BatchNorm with a scale'), (no_norm, dict(criterion='bn_scale', by='channel'), 'pass no BatchNorm with a scale'),
    (net, dict(criterion=broken), 'expected a tensor for each of conv.weight'), (net, dict(criterion=lambda s: 3), 'gives int, expected a tensor for each'),
    (net, dict(criterion='magnitude', layers=nn.LSTM), 'no such layer'), (net, dict(ignore=[nn.Conv2d,'fc']), 'besides those that `ignore` names')])
def test_what_cannot_work_is_refused_before_the_first_batch(fit, make, kw, message):
    learn,count = learner(make()),Count()
    before,n = state(learn.model),len(learn.cbs)
    with pytest.raises((ValueError,TypeError), match=message.replace('(', r'\(')): quiet(learn, 2, 1e-3, fit=fit, cbs=[Pruner(.5, start=.4, **kw), count])
    assert count.n==0 and same(state(learn.model), before) and not masks(learn.model) and len(learn.cbs)==n
    learn.unfreeze()
    assert len(quiet(learn, 1, 1e-3).recorder.values)==1

@pytest.mark.parametrize('schedule', ['one_shot','gradual'])
def test_data_that_a_criterion_cannot_use_is_found_at_the_start(schedule):
    items = [(torch.randn(8), torch.randn(2)) for i in range(32)]
    learn,count = Learner(DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8)), nn.Linear(8,2), loss_func=MSELossFlat()),Count()
    with pytest.raises(ValueError, match='expected one class number for each sample'): quiet(learn, 3, 1e-3, cbs=[Pruner(.5, 'prue', schedule=schedule, start=.4), count])
    assert count.n==0 and not masks(learn.model) and len(learn.metrics)==0

@pytest.mark.parametrize('message,f', [
    ("'bn_scale' scores channels", lambda: Pruner(.5, 'bn_scale')), ("'group_lasso' scores channels", lambda: Pruner(.5, partial(group_lasso))), ("'bn_scale' scores channels", lambda: iterative_prune(learner(), .5, criterion='bn_scale')),
    ('rounds is 0', lambda: Pruner(.5, schedule='gradual', rounds=0)), ('rounds is 2.5', lambda: Pruner(.5, schedule='gradual', rounds=2.5)),
    ('schedule(0.1) is 10', lambda: Pruner(.5, schedule=lambda t: 100*t)), ('expected one of magnitude, random', lambda: Pruner(.5, ['magnitude'])),
    ("ignore holds a Linear that is not in this Sequential", lambda: prune_model(net(), .5, ignore=nn.Linear(2,2))), ("ignore holds a Linear that", lambda: prune_model(net(), .5, ignore=[net().fc])),
    ("ignore holds LSTM, and Sequential has no such layer. There are Conv2d, BatchNorm2d, ReLU, Flatten, Linear", lambda: prune_model(net(), .5, ignore=nn.LSTM)),
    ("has no layer 'cnv'. The nearest names are 'conv'", lambda: prune_model(net(), .5, ignore=['cnv'])), ("has no layer 'layer?.*'", lambda: prune_model(net(), .5, ignore='layer?.*')),
    ('ignore holds 3, expected paths of layers', lambda: prune_model(net(), .5, ignore=[3])),
    ("has no layer 'lstm'", lambda: prune_model(net(), .5, layers='lstm')), ('has no weight in `layers` to prune', lambda: prune_model(net(), .5, layers='norm')),
    ("Embedding has no linear or convolution layer to prune. layers='all' prunes weight", lambda: prune_model(nn.Embedding(3,3)))])
def test_bad_input(message, f):
    with pytest.raises(ValueError) as e: f()
    assert message in str(e.value)

def test_rewinding_does_not_train_before_it_refuses():
    count = Count()
    with pytest.raises(ValueError, match='expected a tensor for each'): quiet(learner(), .5, rewind='weights', n_epoch=2, lr=1e-3, criterion=broken, cbs=count, fit='iterate')
    assert count.n==0


# names, layers, types, patterns

def test_ignore_takes_layers_and_types():
    def left(ignore):
        m = nn.Sequential(OrderedDict(body=net(), head=nn.Linear(10,10)))
        return [k.removesuffix('.weight') for k in masks(prune_model(m, .5, ignore=ignore(m)))]
    assert left(lambda m: m.body)==left(lambda m: [m.body])==left(lambda m: 'body.*')==left(lambda m: (nn.Conv2d, m.body.fc))==['head']
    assert left(lambda m: nn.Linear)==['body.conv'] and left(lambda m: {m.head, 'body.fc'})==['body.conv'] and left(lambda m: 'body.conv.weight')==['body.fc','head']
    assert left(lambda m: None)==left(lambda m: ())==['body.conv','body.fc','head'] and left(lambda m: nn.BatchNorm2d)==['body.conv','body.fc','head']

def test_layers_are_found_wherever_the_network_is():
    "In a compiled one, in a Pruner, in every round, in copies"
    m = net()
    assert masks(prune_model(torch.compile(m, backend='eager'), .5, ignore=m.conv)).keys()=={'fc.weight'}
    learn = learner()
    assert masks(quiet(learn, 1, 1e-3, cbs=Pruner(.5, ignore=[learn.model.conv])).model).keys()=={'fc.weight'}
    learn = learner()
    assert masks(quiet(learn, .5, n_epoch=1, lr=1e-3, fit='iterate', ignore=learn.model.conv).model).keys()=={'fc.weight'}
    with learn.no_bar(),learn.no_logging(): df = sweep_sparsity(learn, levels=(.5,.7), ignore=learn.model.conv, layers=[nn.Linear,nn.Conv2d])
    assert [round(o, 2) for o in df.sparsity]==[round(180/396, 2), round(252/396, 2)]
    assert scores(learn, by='channel', ignore=[learn.model.fc]).keys()=={'conv'}


# files

def test_a_file_with_masks_loads_into_a_bare_network(tmp_path):
    learn = quiet(learner(path=tmp_path), 1, 1e-2, cbs=Pruner(.5))
    learn.save('masked'); learn.save('bare', with_opt=False)
    for file,kw in (('masked',{}), ('bare',dict(with_opt=False)), ('masked',dict(strict=False))):
        other = learner(path=tmp_path).load(file, **kw)
        assert same(state(other.model), state(learn.model)) and gone(other.model)==198
        quiet(other, 1, 1e-2, cbs=Holds())
    assert same(state(load_masked(net(), learn.model.state_dict())), {k: v.cpu() for k,v in state(learn.model).items()})
    assert same(state(load_masked(net(), torch.load(tmp_path/'models/masked.pth', weights_only=False))), {k: v.cpu() for k,v in state(learn.model).items()})

def test_masks_are_those_of_the_file():
    m,other = prune_model(net(), .5, ignore='conv'),prune_model(net(), .9)
    assert same(state(load_masked(other, m.state_dict())), state(m)) and type(other.conv) is nn.Conv2d
    assert not masks(load_masked(other, net().state_dict())) and same(state(other), state(net()))

def test_a_dense_file_and_a_masked_network(tmp_path):
    learn = learner(path=tmp_path)
    learn.save('dense')
    prune_model(learn, .5)
    with pytest.raises(ValueError, match=r'dense holds no mask of conv.weight, .* strict=False'): learn.load('dense')
    assert gone(learn.load('dense', strict=False).model)==198
    unmask(learn.model, masks(learn.model))
    assert same(state(learn.load('dense').model), {k: v.to(default_device()) for k,v in state(net()).items()})

@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_quantisation_says_that_it_finds_no_masked_layers():
    from torch.ao import quantization as q
    m = prune_model(net(), .5)
    with pytest.warns(UserWarning, match=r'fold\(model\) makes the masks permanent'): assert not any('quantized' in type(o).__module__ for o in q.quantize_dynamic(m, {nn.Linear}).modules())
    n = prune_model(nn.Sequential(nn.Conv2d(1,4,3), nn.ReLU()), .5).eval()
    n.qconfig = q.default_qconfig
    with pytest.warns(UserWarning, match=r'fold\(model\)'): q.prepare(n)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        small = q.quantize_dynamic(fold(m), {nn.Linear})
    assert not any('fold' in str(o.message) for o in said) and 'quantized' in type(small.fc).__module__ and small(XB).shape==(20,10)
XB = X[:20].float()/255


# criteria of one's own

@pytest.fixture
def mine():
    @criterion
    def smallest_last(s): return s.sum({k: -w.abs() for k,w in s.weights.items()})
    yield smallest_last
    del criteria['smallest_last']

def test_a_criterion_of_one_s_own_by_object_and_by_name(mine):
    for c in (mine, 'smallest_last', partial(mine)):
        assert masks(prune_model(net(), .5, c)).keys()==masks(quiet(learner(), 1, 0., cbs=Pruner(.5, c, start=.3)).model).keys()
        assert gone(prune_model(m := net(), .3, c))==119 and m.fc._parameters['weight'][m.fc.weight_mask==0].abs().min()>m.fc.weight[m.fc.weight_mask==1].abs().mean()
        assert all((v<=0).all() for v in scores(net(), c).values())
        learn = learner()
        assert abs(sparsity(quiet(learn, .4, n_epoch=1, lr=1e-3, criterion=c, fit='iterate').model)-159/396)<1e-9
        with learn.no_bar(),learn.no_logging(): assert len(sweep_sparsity(learner(), (.5,), criterion=c))==1
    with pytest.raises(ValueError, match="Did you mean 'smallest_last'"): scores(net(), 'smalest_last')

def test_names_of_criteria():
    @criterion('other name', by='channel')
    def f(s): return s.sum(s.weights)
    try:
        assert criteria['other name'] is f and scores(net(), 'other name', data(), by='channel').keys()=={'conv'}
        with pytest.raises(ValueError, match="'other name' scores channels"): Pruner(.5, f)
        with pytest.raises(ValueError, match="by is 'layer'"): criterion('x', by='layer')(f)
    finally: del criteria['other name']
    criteria['plain'] = lambda s: s.sum(s.weights)
    try: assert scores(net(), 'plain').keys()=={'conv.weight','fc.weight'}
    finally: del criteria['plain']
    assert [*criteria][:7]==['magnitude','random','snip','taylor','prue','bn_scale','group_lasso']


# heads that a distillation brings

@pytest.mark.parametrize('first', [True,False])
@pytest.mark.parametrize('kw', [{}, dict(layers='all'), dict(criterion='taylor', schedule='gradual')], ids=str)
def test_heads_are_not_pruned_and_do_not_count(first, kw):
    learn,cbs = learner(),[KnowledgeDistillation(net(), FitNet({'conv':'conv'})), Pruner(.5, **kw)]
    quiet(learn, 2, 1e-3, cbs=cbs if first else cbs[::-1])
    assert gone(learn.model, prunable(learn.model))==198 and not any('distill' in k for k in masks(learn.model))
    assert dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))['sparsity']==sparsity(learn.model)


# a student of an odd teacher

@pytest.mark.parametrize('norm', ['weight_norm','spectral_norm'])
def test_a_student_of_a_teacher_with_computed_weights(norm):
    m = prune_model(normed(NORMS[norm]).eval(), .6)
    student = design_student(m, X[:9].float()/255)
    assert [type(o) for o in student]==[nn.Conv2d,nn.ReLU,nn.Conv2d,nn.ReLU,nn.Flatten,nn.Linear] and student[0].out_channels<6
    assert abs(student_table(m, student).nonzero['total']-student_table(m, student).dense['total']*.4)<1
