"Tokens, several teachers, temperatures over time, places that do not count, and learners that teach each other: right values, and nothing left behind."
import gc, math, random, weakref

import pytest
from fastai.callback.schedule import *
from common import X, Y, data, flat, here, quiet, seeded
from kdnb.all import *
from kdnb.distill.correlation import CC, ICKD
from kdnb.distill.reviewkd import ReviewKD
from kdnb.distill.seen import Seen, probe

DLS = data()
B,N = 4,17

class Patches(nn.Module):
    "A small vision transformer: 16 patches and a class token"
    def __init__(self, d, depth=3):
        super().__init__()
        self.embed,self.first = nn.Conv2d(1, d, 2, 2),nn.Parameter(torch.zeros(1,1,d))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(d, 2, 2*d, 0., batch_first=True) for _ in range(depth))
        self.norm,self.head = nn.LayerNorm(d),nn.Linear(d, 10)
    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        x = torch.cat([self.first.expand(len(x),-1,-1), x], 1)
        for b in self.blocks: x = b(x)
        return self.head(self.norm(x)[:,0])

def vit(d=8, seed=0, **kwargs): set_seed(seed); return here(Patches(d, **kwargs))
def lenet(seed=1): set_seed(seed); return here(create('lenet5', DLS))
def wide(seed=2): set_seed(seed); return here(create('lenet5_caffe', DLS))
def learner(model=None, **kwargs): return seeded(data(), model or lenet(), **kwargs)
def seen(**kwargs):
    set_seed(3)
    return Seen({'b': torch.randn(B,N,6)}, {'b': torch.randn(B,N,8)}, **kwargs)

# References: one sample, one token at a time

def slow_at(f_s, f_t):
    def where(f): q = [sum(v**2 for v in t.tolist())/len(t) for t in f]; return torch.tensor(q)/sum(v*v for v in q)**.5
    return sum(((where(s)-where(t))**2).sum() for s,t in zip(f_s, f_t))/f_s[...,0].numel()
def slow_nst(f_s, f_t):
    def unit(f): return [c/c.norm() for c in f.T]
    def k(a, b): return sum((x@y)**2 for x in a for y in b)/len(a)/len(b)
    return sum(k(s, s)+k(t, t)-2*k(s, t) for s,t in zip(map(unit, f_s), map(unit, f_t)))/len(f_s)
def slow_sp(f_s, f_t):
    def gram(f): return torch.stack([(g := torch.tensor([(a*b).sum() for b in f]))/g.norm() for a in f])
    return (gram(f_s)-gram(f_t)).square().sum()/len(f_s)**2

@pytest.mark.parametrize('term,slow', [(AT('b'), slow_at), (NST('b'), slow_nst), (SP('b'), slow_sp)], ids=['at','nst','sp'])
def test_tokens_are_places(term, slow):
    o = seen()
    assert torch.isclose(term(o), slow(o.f_s['b'], o.f_t['b']), rtol=1e-4)

def test_the_token_of_a_vector():
    o = seen()
    s,t = o.f_s['b'],o.f_t['b']
    for cls,loss in ((PKT, pkt), (RKD, rkd)):
        assert torch.isclose(cls('b')(o), loss(s.mean(1), t.mean(1)))
        assert torch.isclose(cls('b', token='class')(o), loss(s[:,0], t[:,0]))
    o.mask = torch.arange(N)<torch.tensor([[3],[17],[1],[8]])
    v = [torch.stack([f[i,:n].mean(0) for i,n in enumerate((3,17,1,8))]) for f in (s,t)]
    assert torch.isclose(RKD('b')(o), rkd(*v), rtol=1e-4)

def test_heads_of_tokens_are_small_and_take_them_one_by_one():
    o = Seen({'b': torch.randn(2,197,192)}, {'b': torch.randn(2,197,384)})        # DeiT-Tiny to DeiT-Small
    for term,most in ((FitNet('b'), 192*384+384), (VID('b', depth=1), 192*384+2*384)):
        o.head = term.prepare(o)
        assert sum(p.numel() for p in o.head.parameters())==most
        full = term(o)
        o.mask = torch.zeros(2,197).bool(); o.mask[:,5:9] = True
        part = Seen({k: v[:,5:9] for k,v in o.f_s.items()}, {k: v[:,5:9] for k,v in o.f_t.items()}, head=o.head)
        assert torch.isclose(term(o), term(part)) and not torch.isclose(term(o), full, rtol=1e-7)
        o.mask = None

def test_deit_tiny_to_deit_small_at_224_takes_few_bytes():
    "All twelve blocks, and the three that the name alone takes"
    import timm
    set_seed(0)
    tiny,small = (timm.create_model(f'deit_{k}_patch16_224').eval() for k in ('tiny','small'))
    blocks = [f'blocks.{i}' for i in range(12)]
    term, = named_term('FitNet', tiny, small, (torch.zeros(1,3,224,224),)).terms
    assert term.pairs==[(b,b) for b in blocks[3::4]]
    o = Seen({b: torch.zeros(1,197,192) for b in blocks}, {b: torch.zeros(1,197,384) for b in blocks})
    n = [sum(p.numel()*p.element_size() for p in t.prepare(o).parameters()) for t in (term, FitNet(blocks))]
    assert n==[3*4*(192*384+384), 12*4*(192*384+384)] and n[1]<100e6

# Masks: a term sees what it would see of the tokens that count alone

COUNTS = torch.arange(N).expand(B,N)<9
def padded():
    "The same tokens twice: full ones, of which nine count, and those nine alone"
    full = seen()
    short = Seen(*({k: v[:,:9].clone() for k,v in fs.items()} for fs in (full.f_s, full.f_t)))
    for fs in (full.f_s, full.f_t): fs['b'][:,9:] = 1e3
    for o in (full, short):
        o.f_s['c'],o.f_t['c'] = o.f_s['b'].sin(),o.f_t['b'].sin()
        o.z_s,o.z_t = torch.ones(B,3),torch.zeros(B,3)
        o.index,o.labels = torch.arange(B),torch.arange(20)%3
    full.mask = COUNTS
    return full,short

@pytest.mark.parametrize('term', [AT('b'), AT('b', squared=False), NST('b'), SP('b'), PKT('b'), RKD('b'), FSP(['b','c']), FitNet('b'),
                                  VID('b', norm=False), VIDLP('b'), CRD('b', K=None), LwF('b')], ids=lambda t: repr(t)[:24])
def test_padding_does_not_count(term):
    full,short = padded()
    short.head = full.head = head = term.prepare(short)
    if head is not None: head.eval()
    assert torch.isclose(term(full), term(short), rtol=1e-4)

def test_tokens_of_different_length_are_counted_one_by_one():
    "AT's mean goes over all that count, FSP's flow over those of a sample, in float64"
    lengths = [3,17,1,8]
    mask = torch.stack([torch.arange(N)<n for n in lengths])
    o = Seen(*({k: torch.randn(B,N,6).double() for k in 'bc'} for _ in range(2)), mask=mask)
    def where(f): q = f.square().mean(1); return q/q.norm()
    errors = torch.cat([where(o.f_s['b'][i,:n])-where(o.f_t['b'][i,:n]) for i,n in enumerate(lengths)])
    assert torch.isclose(AT('b')(o), errors.square().mean(), rtol=1e-6)
    def flow(fs, i, n): return sum(torch.outer(b, c) for b,c in zip(fs['b'][i,:n], fs['c'][i,:n]))/n
    flows = [(flow(o.f_s, i, n)-flow(o.f_t, i, n)).square() for i,n in enumerate(lengths)]
    o.head = FSP(['b','c']).prepare(o)
    assert torch.isclose(FSP(['b','c'])(o), torch.stack(flows).mean(), rtol=1e-6)

def test_where_nothing_counts_nothing_is_lost():
    o = seen(mask=torch.zeros(B,N).bool())
    for term in (AT('b'), FitNet('b'), VID('b')):
        o.head = term.prepare(o)
        assert term(o)==0

@pytest.mark.parametrize('term', [AT('b'), FSP(['b','b']), FitNet('b'), PKT('b'), CRD('b'), SemCKD('b','b'), ReviewKD(['b','b']), ICKD('b')],
                         ids=lambda t: t.name)
def test_masks_that_cannot_be(term):
    o = seen(labels=torch.arange(20)%3, index=torch.arange(B), bs=B)
    o.head = term.prepare(o)
    o.mask = torch.ones(B,N-1).bool()
    assert torch.isfinite(term(o))                                    # all count, whatever is counted
    o.mask[0,3] = False
    with pytest.raises(ValueError, match=r'the mask has shape \(4, 16\), expected \(4, 17\)'): term(o)
    o.mask = torch.ones(B,N).bool()
    o.mask[0,3] = False
    if isinstance(term, (SemCKD,ReviewKD,ICKD)):
        with pytest.raises(ValueError, match=f'{type(term).__name__} compares whole layers, and some tokens do not count'): term(o)
    elif isinstance(term, AT):
        o.f_t = {'b': torch.randn(B,8,4,4)}
        with pytest.raises(ValueError, match="layers 'b' and 'b' give tokens and maps"): term(o)

@pytest.mark.parametrize('n_s,n_t', [(17,65), (16,65), (65,16), (18,50)])
def test_grids_of_other_sizes(n_s, n_t):
    o = Seen({'b': torch.randn(2,n_s,6)}, {'b': torch.randn(2,n_t,8)})
    for term in (AT('b'), NST('b'), FitNet('b'), VID('b')):
        o.head = term.prepare(o)
        assert term(o).isfinite()
    with pytest.raises(ValueError, match='19 tokens are no square grid'): AT('b')(Seen({'b': torch.randn(2,19,6)}, o.f_t))

def test_a_transformer_learns_from_a_transformer_and_from_maps():
    names = ['blocks.0','blocks.2']
    terms = AT(names)*100 + NST(names) + SP(names)*10 + RKD(names) + PKT(names)*100 + FitNet(names) + VID(names)
    learn = quiet(learner(vit()), 2, 1e-2, fit='fit', cbs=KnowledgeDistillation(vit(12, 1), terms))
    first,last = learn.recorder.values
    assert last[-1]<first[-1] and last[-2]<first[-2]                  # VID and FitNet learn
    quiet(learner(vit()), 1, 1e-2, cbs=KnowledgeDistillation(wide(), AT({'blocks.2': 'conv2'}) + FitNet({'blocks.2': 'conv2'})))
    assert named_term('FitNet', vit(), vit(12, depth=6), DLS).terms[0].pairs==[('blocks.0','blocks.1'), ('blocks.1','blocks.3'), ('blocks.2','blocks.5')]
    assert named_term('SP', vit(), vit(12), DLS).terms[0].pairs==[('blocks.2','blocks.2')]

def test_srrl_reads_tokens_with_the_rest_of_the_teacher():
    class Rows(nn.Module):
        def __init__(self, d): super().__init__(); self.b,self.norm,self.head = nn.Linear(8, d),nn.LayerNorm(d),nn.Linear(d, 10)
        def forward(self, x): return self.head(self.norm(self.b(x[:,0])).mean(1))
    s,t = here(Rows(6)),here(Rows(9))
    o = probe(s, t, DLS, ['b'], ['b'])
    o.head = SRRL('b').prepare(o)
    f = o.head[0].conv(o.f_s['b'])
    right = F.mse_loss(f.mean(1), o.f_t['b'].mean(1)) + F.mse_loss(t.head(t.norm(f).mean(1)), o.z_t)
    assert torch.isclose(SRRL('b')(o), right)
    quiet(learner(s), 1, 1e-2, cbs=KnowledgeDistillation(t, SRRL('b')))

def test_distillation_token():
    class Deit(nn.Module):
        def __init__(self): super().__init__(); self.body,self.head,self.head_dist = nn.Sequential(nn.Flatten(), nn.Linear(64,9)),nn.Linear(9,10),nn.Linear(9,10)
        def forward(self, x): x = self.body(x); return self.head(x),self.head_dist(x)
    for term in (DistillToken(), DistillToken(hard=False)):
        model = here(Deit())
        before = [o.weight.clone() for o in (model.head, model.head_dist)]
        learn = Learner(data(), model, loss_func=lambda z,y: F.cross_entropy(z[0] if isinstance(z, tuple) else z, y), opt_func=SGD)
        quiet(learn, 1, 1e-2, cbs=KnowledgeDistillation(wide(), term*.5, task=0., logits=0))
        assert torch.equal(model.head.weight, before[0]) and not torch.equal(model.head_dist.weight, before[1])

# Several teachers

def ask(teachers, terms, cache=False, n=1, **kwargs):
    learn = quiet(learner(opt_func=SGD), n, 1e-2, cbs=KnowledgeDistillation(teachers, terms, cache=cache, **kwargs))
    return flat(learn.model),learn.recorder.values[-1][-1]

class Mean(nn.Module):
    "What the softened answers of several networks are on average, as logits"
    def __init__(self, nets, shares, T): super().__init__(); self.nets,self.shares,self.T = nn.ModuleList(nets),shares,T
    def forward(self, x): return self.T*sum(a*(n(x)/self.T).softmax(1) for n,a in zip(self.nets, self.shares)).log()

@pytest.mark.parametrize('cache', [False,True])
def test_the_mean_of_two_is_the_mean_of_their_softened_answers(cache):
    pair = [wide(), lenet(7)]
    for shares,given in (([.5,.5], None), ([.75,.25], [3,1])):
        w,v = ask(pair, KD(T=3), cache, shares=given)
        u,right = ask(Mean(pair, shares, 3), KD(T=3))
        assert abs(v-right)<1e-4 and torch.allclose(w, u, atol=1e-5)

def test_a_term_for_each_teacher_and_one_pass_for_all():
    pair,passes = [wide(), lenet(7)],[]
    for i,m in enumerate(pair): m.register_forward_hook(lambda m,x,z,i=i: passes.append((i,m.training)))
    terms = KD(teacher=0)*.5 + KD(teacher=1)*.5 + AT('conv2', teacher=0) + VID('conv1', teacher=1) + KD()
    learn = learner(cbs=KnowledgeDistillation(pair, terms))
    passes.clear()
    quiet(learn, 1, 1e-3)
    n = len(learn.dls.train)
    assert {i: sum(o==(i,False) for o in passes)-n for i in (0,1)}[0] in range(0, 4) and not any(t for _,t in passes)
    assert len(learn.recorder.values[-1])==3+5
    learn = quiet(learner(), 1, 1e-3, cbs=KnowledgeDistillation(pair, KD(teacher=0) + KD(teacher=1)*0))
    assert [len(m._forward_hooks) for m in pair]==[1,1]

def test_two_teachers_with_features_cached_in_memory_and_files(tmp_path):
    pair,terms = [wide(), lenet(7)],KD() + AT('conv2', teacher=0)*10 + VID('conv1', teacher=1)
    right = ask(pair, terms)[0]
    for cache in (True, tmp_path, tmp_path): assert torch.allclose(ask(pair, terms, cache)[0], right, atol=1e-5)
    assert sorted(o.name for o in tmp_path.iterdir())==['teacher0','teacher1']

def test_stored_logits_in_a_file_and_in_float64(tmp_path):
    table = answers(wide(), data().train)[''].cpu()
    np.save(tmp_path/'z.npy', table.double().numpy())
    right = ask(table, KD())[0]
    for o in (table.double().numpy(), tmp_path/'z.npy', str(tmp_path/'z.npy')): assert torch.allclose(ask(o, KD())[0], right, atol=1e-5)

def test_a_teacher_of_stored_logits():
    t = wide()
    table = answers(t, data().train)['']
    right = ask(t, KD(), n=2)[0]
    for o in (table, table.cpu().numpy()): assert torch.allclose(ask(o, KD(), n=2)[0], right, atol=1e-5)
    assert torch.allclose(ask([table, t], KD(T=2))[0], ask(t, KD(T=2))[0], atol=1e-5)
    for message,o,terms in (('are of 7 samples, the training set has', table[:7], KD()), ("has no layer 'conv2'", table, AT('conv2')),
                            ('expected floating point numbers', table.argmax(1), KD())):
        with pytest.raises(ValueError, match=message): ask(o, terms)
    with pytest.raises(ValueError, match='stored logits, but MixUp mixes'): quiet(learner(), 1, cbs=[KnowledgeDistillation(table), MixUp()])
    x,y = DLS.train.dataset.x[:64].float()/255,DLS.train.dataset.y[:64]
    class Streamed(TfmdDL):
        def sample(self): return super().sample()
    plain = DataLoaders(*[Streamed(list(zip(x, y)), bs=16, num_workers=0)]*2)
    with pytest.raises(ValueError, match='a teacher of stored logits needs to know which sample is which'):
        quiet(seeded(plain, lenet()), 1, cbs=KnowledgeDistillation(table[:64]))

@pytest.mark.parametrize('message,make', [
    ('KD asks teacher 2, and there are 2', lambda: KnowledgeDistillation([wide(), wide()], KD(teacher=2))),
    ('AT compares layers, and there are 2 teachers. Say whose', lambda: KnowledgeDistillation([wide(), wide()], AT('conv1'))),
    ('shares is .1, 2, 3., expected 2 numbers', lambda: KnowledgeDistillation([wide(), wide()], shares=[1,2,3])),
    ("teacher is 'first', expected its place", lambda: KD(teacher='first')),
    ('teacher gives 7 outputs, student 10', lambda: quiet(learner(), 1, cbs=KnowledgeDistillation([wide(), create('lenet5', DLS, c=7).to(DLS.device)], KD(teacher=1)))),
    ('T gives -1 at progress 0', lambda: quiet(learner(), 1, cbs=KnowledgeDistillation(wide(), KD(T=lambda p: -1.)))),
    ("token is 'last'", lambda: RKD('b', token='last')),
    ('teachers 0 and 1 give outputs of shape .64, 10. and .64, 7., which have no mean', lambda: quiet(learner(), 1, cbs=KnowledgeDistillation([wide(), create('lenet5', DLS, c=7).to(DLS.device)]))),
    (r'T is \[4, 1\], expected a temperature', lambda: KD(T=[4,1])),
    ("teacher is 'net.pth', expected a Learner, a network, or logits by sample", lambda: KnowledgeDistillation('net.pth')),
    ('the peer gives outputs of shape .64, 7., this learner .64, 10.', lambda: quiet(learner(), 1, cbs=MutualLearning(learner(create('lenet5', DLS, c=7))))),
])
def test_bad_input(message, make):
    with pytest.raises(ValueError, match=message): make()

# Over time

def test_a_scheduled_temperature():
    o = Seen(z_s=torch.randn(5,4), z_t=torch.randn(5,4), y=torch.arange(5)%4)
    for cls,loss in ((KD, kd), (BinaryKD, binary_kd), (LwF, lwf)):
        for pct in (0., .25, 1.):
            o.pct = pct
            assert torch.isclose(cls(T=SchedLin(8., 2.))(o), loss(o.z_s, o.z_t, 8-6*pct))
    o.pct = .5
    assert torch.isclose(DKD(T=SchedLin(8., 2.))(o), dkd(o.z_s, o.z_t, o.y, T=5.)) and torch.isclose(DIST(T=SchedLin(3., 1.))(o), dist(o.z_s, o.z_t, T=2.))
    temperatures = []
    def falling(pct): temperatures.append(pct); return 4-2*pct
    learn = quiet(learner(), 2, 1e-3, cbs=KnowledgeDistillation(wide(), KD(T=falling)))
    n = len(learn.dls.train)
    assert temperatures==[pytest.approx(i/(2*n)) for i in range(2*n)]
    assert torch.equal(ask(wide(), KD(T=lambda p: 4.))[0], ask(wide(), KD(T=4.))[0])

# Places that do not count

def pixels(size=8, ignored=255):
    y = (X[:32,0]>90).long()
    y[:,:3] = ignored
    return DataLoaders(*[DataLoader([(x,o) for x,o in zip(X[:32].float()/255, y)], bs=16) for _ in range(2)])
def fcn(c=3, stride=1, seed=0): set_seed(seed); return here(nn.Sequential(nn.Conv2d(1,8,3,stride,1), nn.ReLU(), nn.Conv2d(8,c,1)))

@pytest.mark.parametrize('term', [KD(), BinaryKD(), LogitsMSE(), DIST(), DKD(), KD(standardize=True), LwF(), DistillToken('2')],
                         ids=lambda t: repr(t)[:12])
def test_ignored_pixels_do_not_count(term):
    "What the teacher says there changes nothing"
    class Mad(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): z = self.net(x); return torch.cat([1000*z[:,:,:3].flip(1), z[:,:,3:]], 2)
    t,res = fcn(seed=1),[]
    for teacher in (t, Mad(t)):
        learn = Learner(pixels(), fcn(), CrossEntropyLossFlat(axis=1, ignore_index=255), opt_func=SGD)
        quiet(learn, 1, .1, cbs=KnowledgeDistillation(teacher, term))
        res.append(flat(learn.model))
    assert torch.equal(*res) and res[0].isfinite().all()

def test_a_mask_of_ones_own():
    def run(**kwargs):
        learn = Learner(pixels(ignored=1), fcn(), CrossEntropyLossFlat(axis=1), opt_func=SGD)
        quiet(learn, 1, .1, cbs=KnowledgeDistillation(fcn(seed=1), KD(), task=0., **kwargs))
        return flat(learn.model)
    nothing = run(mask=lambda xb,yb: torch.zeros_like(yb[0]).bool())
    assert torch.equal(nothing, flat(fcn())) and not torch.equal(run(), nothing)
    assert torch.equal(run(mask=lambda xb,yb: torch.ones_like(yb[0]).bool()), run())
    with pytest.raises(ValueError, match=r'the mask has shape \(16, 8\), expected \(16, 8, 8\)'): run(mask=lambda xb,yb: yb[0][:,0]==0)

def test_a_teacher_of_another_size_is_resized():
    "For every term on logits of pixels"
    t = fcn(stride=2, seed=1)
    class Resized(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return F.interpolate(self.net(x), size=x.shape[2:], mode='bilinear', align_corners=False)
    def taught(teacher, term):
        learn = Learner(pixels(ignored=1), fcn(), CrossEntropyLossFlat(axis=1), opt_func=SGD)
        quiet(learn, 1, 1e-2, cbs=KnowledgeDistillation(teacher, term, task=0.))
        return flat(learn.model)
    for term in (KD(), BinaryKD(), LogitsMSE(), DKD(), DIST(), LwF(), DistillToken('2'), DistillToken('2', hard=False)):
        assert torch.allclose(taught(t, term), taught(Resized(t), term), atol=1e-6), term
        assert not torch.equal(taught(t, term), flat(fcn())), term

def maps_of(term, mask, f_s=(6,8,8), f_t=(7,4,4), mess=0., by_label=False):
    "The loss of `term` on random maps, the teacher's with `mess` added where the mask is False"
    set_seed(5)
    f_s,f_t = {k: torch.randn(3,*f_s) for k in 'ab'},{k: torch.randn(3,*f_t) for k in 'ab'}
    o = Seen(f_s, f_t, z_t=torch.randn(3,5), bs=3)
    o.head = term.prepare(o)
    if mask is not None:
        left_out = ~(F.adaptive_avg_pool2d(mask[:,None].float(), f_t['a'].shape[2:])>=.5)
        for k in f_t: f_t[k] += mess*left_out
    o.mask,o.by_label = mask,by_label
    return float(term(o))

@pytest.mark.parametrize('term', [FitNet('a'), VID('a'), AT('a'), NST('a'), SP('a'), PKT('a'), RKD('a'), CC('a'), FSP(['a','b']), Terms],
                         ids=lambda t: 'SimKD' if t is Terms else type(t).__name__)
def test_pixels_that_do_not_count_are_left_out_of_maps(term):
    "Layers are smaller than the mask, and of two sizes: what the teacher has there changes nothing, unless `mask` only says what has a label"
    mask = (torch.arange(16)<9).expand(3,16,16)
    if term is Terms:       # SimKD compares the projector's maps
        term = SimKD('a')
        o = Seen({'projector': torch.randn(3,7,4,4)}, {'a': torch.randn(3,7,4,4)}, mask=mask)
        once = term(o)
        o.f_t['a'][...,2:] += 50
        assert torch.equal(term(o), once) and term(Seen(o.f_s, o.f_t))>once
        return
    once = maps_of(term, mask)
    assert maps_of(term, mask, mess=50.)==pytest.approx(once, rel=1e-5) and math.isfinite(once)
    assert maps_of(term, mask, mess=50., by_label=True)!=pytest.approx(once, rel=1e-3)
    assert maps_of(term, torch.ones(3,16,16).bool())==pytest.approx(maps_of(term, None), rel=1e-5)
    assert math.isfinite(maps_of(term, torch.zeros(3,16,16).bool()))

def test_a_mask_of_pixels_by_hand():
    "A place counts if at least half of its pixels do"
    set_seed(6)
    f_s,f_t = torch.randn(2,3,2,2),torch.randn(2,3,2,2)
    mask = torch.ones(2,4,4).bool()
    mask[0,:2,:2] = tensor([[False,False],[False,True]])        # one of four
    mask[1,2:,2:] = tensor([[False,True],[True,False]])         # two of four
    counts = torch.ones(2,2,2).bool()
    counts[0,0,0] = False
    o = Seen({'a': f_s}, {'a': f_t}, mask=mask)
    term = FitNet('a', norm=False, relu=False)
    o.head = term.prepare(o)
    with torch.no_grad(): z = o.head[0](f_s*counts[:,None])
    assert torch.isclose(term(o), (z-f_t).square().mean(1)[counts].mean())
    def where(f): return [(f[i].square().mean(0)*counts[i]).flatten() for i in range(2)]
    q = [[v/v.norm() for v in where(f)] for f in (f_s,f_t)]
    assert torch.isclose(AT('a')(o), sum((a-b).square().sum() for a,b in zip(*q))/7)

def test_masks_of_pixels_on_tokens_and_what_cannot_leave_out():
    o = Seen({'b': torch.randn(2,17,6)}, {'b': torch.randn(2,8,4,4)}, mask=(torch.arange(8)<4).expand(2,8,8))
    once = AT('b')(o)
    o.f_t['b'][...,2:] += 9
    assert torch.isclose(AT('b')(o), once)
    for term in (ICKD('b'), ReviewKD(['b','c']), SemCKD('b', 'b')):
        o = Seen({k: torch.randn(2,8,4,4) for k in 'bc'}, {k: torch.randn(2,8,4,4) for k in 'bc'}, bs=2)
        o.head = term.prepare(o)
        o.mask = (torch.arange(8)<4).expand(2,8,8)
        with pytest.raises(ValueError, match='compares whole layers, and some pixels do not count'): term(o)
    o.mask = torch.arange(5).expand(2,5)<3
    with pytest.raises(ValueError, match=r'the mask has shape \(2, 5\), expected \(2, H, W\) for maps'): AT('b')(o)

@pytest.mark.parametrize('mask,message', [(lambda xb,yb: None, 'mask gives None, expected a tensor of True and False'),
                                          (lambda xb,yb: torch.rand(16,8,8), 'mask gives torch.float32 of shape')])
def test_what_is_no_mask(mask, message):
    learn = Learner(pixels(ignored=1), fcn(), CrossEntropyLossFlat(axis=1))
    with pytest.raises(ValueError, match=message): quiet(learn, 1, cbs=KnowledgeDistillation(fcn(seed=1), KD(), mask=mask))

# Loaders that number their samples

def numbers(n=50): return list(zip(X[:n].float()/255, Y[:n]))
class Longest(TfmdDL):
    "Sorts what it does not shuffle, as fastai's loader of texts does"
    def get_idxs(self): return super().get_idxs() if self.shuffle else list(range(self.n))[::-1]
def loaders(cls=TfmdDL, items=None, **kwargs):
    return DataLoaders(*[cls(items or numbers(), bs=16, shuffle=s, num_workers=0, **kwargs) for s in (True,False)])

@pytest.mark.parametrize('make', [loaders, lambda: loaders(Longest), lambda: loaders(drop_last=True), lambda: loaders(DataLoader)],
                         ids=['fastai','sorted','drop_last','plain'])
def test_any_loader_of_numbered_samples_is_cached(make, tmp_path):
    class Other(Callback):
        "Reads the training set within an epoch"
        def after_batch(self): self.dls.train.one_batch()
    def run(cache):
        dls = make()
        dls.train.rng = random.Random(0)
        learn = Learner(dls, lenet(), CrossEntropyLossFlat(), opt_func=SGD)
        set_seed(1)
        quiet(learn, 2, 1e-2, cbs=[KnowledgeDistillation(wide(), KD() + AT('conv2'), cache=cache), Other()])
        assert 'get_idxs' not in vars(dls.train)
        return flat(learn.model)
    right = run(False)
    for cache in (True, tmp_path, tmp_path): assert torch.allclose(run(cache), right, atol=1e-5)

class Trembling:
    "A data set that augments on its own, which no transform tells"
    def __len__(self): return 50
    def __getitem__(self, i): return X[i].float()/255+torch.rand(1),Y[i]

class Seldom(RandTransform):
    def encodes(self, x:torch.Tensor): return x
class Half(TfmdDL):
    def get_idxs(self): return super().get_idxs()[::2]

@pytest.mark.parametrize('message,make', [
    ('samples change from epoch to epoch, by the data set itself', lambda: loaders(items=Trembling())),
    ('samples change from epoch to epoch, by Seldom', lambda: loaders(after_batch=[Seldom(p=.01)])),
    ('Half gives 25 of its 50 samples', lambda: loaders(Half)),
    ('needs to know which sample is which, and DataLoader does not say. Use image_dls, from_arrays, or fastai', lambda: DataLoaders(*[DataLoader(iter(numbers()), bs=16)]*2)),
])
def test_what_cannot_be_cached(message, make):
    with pytest.raises(ValueError, match=message): quiet(Learner(make(), lenet(), CrossEntropyLossFlat()), 1, cbs=KnowledgeDistillation(wide(), KD(), cache=True))

def test_a_folder_of_another_data_set_is_noticed(tmp_path):
    "Whose first batch is the same"
    def run(n): quiet(Learner(loaders(items=numbers(n)), lenet(), CrossEntropyLossFlat()), 1, cbs=KnowledgeDistillation(wide(), KD(), cache=tmp_path))
    run(40)
    run(40)
    with pytest.raises(ValueError, match='holds the outputs of another network'): run(50)

def test_torch_s_own_loaders():
    "Distil, with features too, and are not cached"
    rows = torch.utils.data.TensorDataset(X[:32].float()/255, Y[:32])
    dls = DataLoaders(*[torch.utils.data.DataLoader(rows, 16) for _ in range(2)], device=DLS.device)
    learn = Learner(dls, lenet(), CrossEntropyLossFlat())
    quiet(learn, 1, cbs=KnowledgeDistillation(Learner(dls, wide(), CrossEntropyLossFlat()), KD() + FitNet('conv2') + SemCKD('conv2', 'conv2')))
    with pytest.raises(ValueError, match='needs to know which sample is which, and DataLoader does not say'):
        quiet(learn, 1, cbs=KnowledgeDistillation(wide(), KD(), cache=True))

# Terms by their names

def test_terms_by_name():
    "Are those that `named_term` builds"
    net = lenet()
    named = named_term('KD + VID-I', net, wide(), DLS)
    a,b = learner(opt_func=SGD),learner(opt_func=SGD)
    kd_a,kd_b = KnowledgeDistillation(wide(), 'KD + VID-I'),KnowledgeDistillation(wide(), named)
    for learn,kd_ in ((a,kd_a), (b,kd_b)): quiet(learn, 1, 1e-3, cbs=kd_)
    assert (list(kd_a.terms), kd_a.weights, kd_a.task)==(['kd','vid'], kd_b.weights, kd_b.task)
    assert torch.allclose(flat(a.model), flat(b.model), atol=1e-5)
    check_terms('KD + AT', net, wide(), DLS)
    with pytest.raises(ValueError, match='AT compares layers, and there are 2 teachers'): quiet(learner(), [wide(), wide()], 1, 'KD + AT', fit='distill')
    with pytest.raises(ValueError, match='stored logits'): quiet(learner(), torch.randn(len(DLS.train.dataset),10), 1, 'AT', fit='distill')
    learn = learner()
    quiet(learn, wide(), 1, 'SimKD', fit='distill')
    assert hasattr(learn.model, 'projector')

def test_srrl_of_pixels_at_the_size_of_the_mask():
    "The student's map is half as large as the teacher's, and so are the class maps that the teacher's rest makes of it"
    s,t = fcn(stride=2),fcn(seed=1)
    o = probe(s, t, pixels(), ['1'], ['1'])
    o.head = SRRL('1').prepare(o)
    f,z = o.head[0](o.f_s['1'])
    small = F.adaptive_avg_pool2d(o.f_t['1'], 4)
    z = F.interpolate(z, size=(8,8), mode='bilinear', align_corners=False)
    features = F.mse_loss(f.mean((2,3)), small.mean((2,3)))
    assert torch.isclose(SRRL('1')(o), features + F.mse_loss(z, o.z_t))
    o.mask = torch.arange(8).expand(len(z),8,8).to(z.device)<6
    features = F.mse_loss(f[...,:3].mean((2,3)), small[...,:3].mean((2,3)))
    assert torch.isclose(SRRL('1')(o), features + F.mse_loss(z[...,:6], o.z_t[...,:6]))

# Each other

def test_mutual_steps_are_those_of_the_paper():
    "One batch, by hand"
    a,b = lenet(1),lenet(5)
    xb,yb = DLS.train.dataset.x[:16].float()/255,DLS.train.dataset.y[:16]
    xb,yb = xb.to(DLS.device),yb.to(DLS.device)
    dls = DataLoaders(*[DataLoader(list(zip(xb, yb)), bs=16) for _ in range(2)])
    first,second = (Learner(dls, deepcopy(m), CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.), wd=0.) for m in (a,b))
    quiet(first, 1, .1, cbs=MutualLearning(second, weight=.7, T=2.))
    z_a,z_b = a(xb),b(xb)
    (F.cross_entropy(z_a, yb) + .7*kd(z_a, z_b.detach(), 2.)).backward()
    (F.cross_entropy(z_b, yb) + .7*kd(z_b, z_a.detach(), 2.)).backward()
    for net,learn in ((a,first), (b,second)):
        for p,q in zip(net.parameters(), learn.model.parameters()): assert torch.allclose(p-.1*p.grad, q, atol=1e-6)

def test_peers_do_not_compare_ignored_pixels():
    class Mad(nn.Module):
        "Answers at the ignored pixels, and there alone, that are otherwise"
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): z = self.net(x); return torch.cat([9+z[:,:,:3].flip(1), z[:,:,3:]], 2)
    res = []
    for wrap in (noop, Mad):
        a,b = [Learner(pixels(), net, CrossEntropyLossFlat(axis=1, ignore_index=255), opt_func=SGD) for net in (fcn(), wrap(fcn(seed=1)))]
        quiet(a, 1, .1, cbs=MutualLearning(b))
        res.append(torch.cat([flat(a.model), flat(b.model)]))
    assert torch.equal(*res) and res[0].isfinite().all()

def test_a_peer_follows_the_schedule_of_the_rate():
    a,b = learner(),learner(lenet(5))
    with a.no_bar(), a.no_logging(): a.fit_one_cycle(1, 1e-2, cbs=MutualLearning(b, weight=SchedLin(0., 1.), T=SchedCos(4., 1.)))
    assert b.opt.hypers[-1]['lr']==pytest.approx(float(a.opt.hypers[-1]['lr']))

def test_mutual_learning_leaves_nothing_and_refuses():
    a,b = learner(),learner(lenet(5))
    b.model.eval()
    quiet(a, 1, 1e-3, cbs=MutualLearning(b))
    assert not b.model.training and a.metrics.attrgot('name')==['accuracy'] and all(p.grad is None or not p.grad.any() for p in b.model.parameters())
    before = flat(b.model)
    for message,make in (('peer is a Sequential', lambda: MutualLearning(nn.Sequential())), ('the same network', lambda: quiet(a, 1, cbs=MutualLearning(a))),
                         ('GradientAccumulation', lambda: quiet(a, 1, cbs=[MutualLearning(b), GradientAccumulation(128)]))):
        with pytest.raises(ValueError, match=message): make()
    assert torch.equal(flat(b.model), before)

# Memory

def test_five_fits_on_one_learner_leave_nothing():
    learn,t,seen_ = learner(),wide(),[]
    terms = KD() + FitNet('conv2') + VID('conv1') + CRD({'fc2': 'fc1'})
    counts = []
    for _ in range(5):
        kd_ = KnowledgeDistillation(t, terms, cache=True)
        seen_ += [weakref.ref(kd_), weakref.ref(kd_.heads)]
        quiet(learn, 1, 1e-3, cbs=kd_)
        seen_.append(weakref.ref(kd_.heads))
        del kd_
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert counts[-1]==counts[1] and not any(o() is not None for o in seen_)
