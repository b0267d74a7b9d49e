"What a network says, against slow references in double precision; curves whose breakpoint is evident."
import pytest
from kdnb.all import *
from kdnb.measure.outputs import _class_variance

def slow_p(z, y):
    "The true class's probability of each sample, one after the other"
    p = []
    for row,c in zip(z.double().tolist(), y.tolist()):
        e = [math.exp(o-max(row)) for o in row]
        p.append(e[c]/sum(e))
    return p

def slow_uncertainty(z, y):
    p,total = slow_p(z, y),0.
    classes = sorted(set(y.tolist()))
    for c in classes:
        own = [o for o,k in zip(p, y.tolist()) if k==c]
        mean = math.fsum(own)/len(own)
        total += math.fsum((o-mean)**2 for o in own)/len(own)
    return total/len(classes)

def slow_smoothness(z_t, z_p, y):
    return math.fsum(math.log(a/b) for a,b in zip(slow_p(z_t, y), slow_p(z_p, y)))/len(y)

def batches(*o, bs=16, order=None):
    "`(*inputs, labels)` in batches"
    order = torch.arange(len(o[-1])) if order is None else order
    return [tuple(t[i] for t in o) for i in order.split(bs)]

@pytest.fixture
def nets():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6,4), nn.Dropout(.5)),nn.Sequential(nn.Linear(6,9), nn.BatchNorm1d(9), nn.Linear(9,4))

@pytest.fixture
def data(): torch.manual_seed(1); return torch.randn(101,6)*3,torch.randint(4, (101,))

def logits(m, x):
    with evaluating(m), torch.no_grad(): return m(x)

@pytest.mark.parametrize('bs', (1,7,101,500))
@pytest.mark.parametrize('shuffled', (False,True))
def test_formulas(nets, data, bs, shuffled):
    (a,b),(x,y) = nets,data
    dl = batches(x, y, bs=bs, order=torch.randperm(101) if shuffled else None)
    za,zb = logits(a, x),logits(b, x)
    for m,z in ((a,za), (b,zb)): assert uncertainty(m, dl)==pytest.approx(slow_uncertainty(z, y), rel=1e-6)
    same = [max(range(4), key=r.__getitem__)==max(range(4), key=s.__getitem__) for r,s in zip(za.tolist(), zb.tolist())]
    assert agreement(a, b, dl)==sum(same)/101 and 0<sum(same)<101 and agreement(a, a, dl)==1
    assert smoothness(a, b, dl)==pytest.approx(slow_smoothness(za, zb, y), rel=1e-6)
    assert accuracy_on(a, dl)==sum(int(r.argmax()==c) for r,c in zip(za, y))/101

def test_the_mean_is_taken_first():
    "A spread of 1e-9 about one half: the mean square less the squared mean would lose it"
    p = .5 + torch.tensor([0,1,2]*3).double()*2**-30
    assert _class_variance(p, torch.zeros(9).long()).item()==pytest.approx(2/3*4**-30, rel=1e-9)

def test_extremes_of_uncertainty():
    y = torch.tensor([3,3,7,7])
    def z(*p): return F.one_hot(torch.tensor(p), 9)*200.
    sure,half = z(3,3,7,7),z(3,0,7,0)
    assert uncertainty(nn.Identity(), [(sure, y)])==0
    assert uncertainty(nn.Identity(), [(half, y)])==pytest.approx(.25)   # the most there is; absent classes do not count
    assert uncertainty(nn.Identity(), [(half[:3], y[:3])])==pytest.approx(.125)
    assert uncertainty(nn.Identity(), [(torch.full((4,9), 7.), y)])==0   # as unsure as can be, and always alike

def test_smoothness_of_certain_answers():
    "Logits of ±200: the probabilities are 0 and 1 in single precision"
    z,y = torch.tensor([[200.,-200.],[200.,-200.]]),torch.tensor([0,1])
    assert smoothness(nn.Identity(), Lambda(lambda x: x/2), [(z, y)])==pytest.approx(-100, rel=1e-6)
    assert smoothness(nn.Identity(), nn.Identity(), [(z, y)])==0

def test_half_precision_logits():
    z,y = torch.randn(50,5)*4,torch.randint(5, (50,))
    for dtype in (torch.bfloat16,torch.float16):
        half = Lambda(lambda x: x.to(dtype))
        assert uncertainty(half, [(z, y)])==pytest.approx(slow_uncertainty(half(z), y), rel=1e-9)

def test_several_inputs(data):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,4),nn.Bilinear(6,2,4)
        def forward(self, x, v): return self.a(x)+self.b(x, v)
    (x,y),v,m = data,torch.randn(101,2),Two()
    with torch.no_grad(): z = m(x, v)
    out = predictions(m, batches(x, v, y, bs=10))
    assert torch.allclose(out[0], z, atol=1e-5) and torch.equal(out[1], y)
    assert uncertainty(m, batches(x, v, y))==pytest.approx(slow_uncertainty(z, y), rel=1e-6)

@pytest.mark.filterwarnings('ignore:The given NumPy array')
def test_tabular_data():
    "Two inputs, and labels of shape (B, 1)"
    from fastai.tabular.all import Categorify, TabularDataLoaders, TabularModel
    set_seed(0)
    k,y = (np.random.choice(list(o), 90) for o in ('abc','uvw'))
    df = pd.DataFrame(dict(k=k, v=np.random.randn(90), y=y))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['k'], cont_names=['v'], y_names='y', bs=8,
                                     y_block=CategoryBlock(), valid_idx=list(range(30)))
    m = TabularModel([(4,3)], 1, 3, [8])
    z,y = predictions(m, dls.train)
    assert z.shape==(60,3) and [dls.vocab[o] for o in y]==df.y[30:].tolist() and 0<accuracy_on(m, dls.train)<1

@pytest.mark.parametrize('index', (False,True))
def test_a_training_loader_is_read_as_if_for_validation(index):
    dls = image_dls(pad=2, flip=True, drop_last=True, bs=100, index=index)
    m = create('lenet300', dls)
    z,y = predictions(m, dls.train)
    ds = dls.train.dataset
    x = Pipeline([o for o in dls.train.after_batch if not isinstance(o, RandTransform)])(TensorImage(ds.x))
    assert torch.equal(y, ds.y) and torch.allclose(z, logits(m, x.as_subclass(Tensor)), atol=1e-4)
    assert ds.split_idx==0 and dls.train.drop_last and dls.train.shuffle
    assert not torch.equal(*(dls.train.new(shuffle=False).one_batch()[0] for _ in range(2)))   # it augments as before

def test_random_crops_of_any_dataloaders():
    set_seed(0)
    imgs = [PILImage.create(np.random.randint(0, 255, (12,12,3), dtype=np.uint8)) for _ in range(20)]
    block = DataBlock((ImageBlock,CategoryBlock), get_x=lambda i: imgs[i], get_y=lambda i: 'ab'[i%2],
                      splitter=IndexSplitter(range(4)), item_tfms=RandomCrop(8), batch_tfms=Flip(p=.5))
    dls = block.dataloaders(list(range(20)), bs=5, num_workers=0)
    m = nn.Sequential(nn.Flatten(), nn.Linear(3*8*8,2))
    (za,y),(zb,_) = predictions(m, dls.train),predictions(m, dls.train)
    assert torch.equal(za, zb) and y.tolist()==[0,1]*8

def test_models_see_the_same_batches(data):
    "A loader that shuffles in its own way, which nobody can put in order"
    x,y = data
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16, shuffle=True)
    a,b = nn.Linear(6,4),nn.Linear(6,4)
    b.load_state_dict(a.state_dict())
    za,zb,_ = predictions((a,b), dl)
    assert torch.equal(za, zb) and agreement(a, b, dl)==1 and smoothness(a, b, dl)==0
    assert agreement(a, b, (o for o in batches(x, y)))==1           # an iterator can be read only once

def test_nothing_is_left_changed(nets, data):
    a,b = nets
    b[1].eval()
    dls = image_dls()
    m = create('lenet300', dls)
    states = random.getstate(),torch.get_rng_state()
    smoothness(a, b, batches(*data)); accuracy_on(m, dls.train)
    assert (a.training,a[1].training,b.training,b[1].training,m.training)==(True,True,True,False,True)
    assert random.getstate()==states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert int(b[1].num_batches_tracked)==0 and all(p.grad is None for p in a.parameters())
    def fails(x): raise KeyError('x')
    broken = nn.Sequential(nn.Dropout(), Lambda(fails))
    with pytest.raises(KeyError): accuracy_on(broken, batches(*data))
    assert broken.training and broken[0].training

@pytest.mark.parametrize('dl, sentence', [
    ([], 'no batch'),
    ([(torch.zeros(2,3),)], 'has labels'),
    ([torch.zeros(2,3)], 'has labels'),
    ([(torch.zeros(2,3),torch.zeros(2,3))], 'one class number'),
    ([(torch.zeros(2,3),torch.zeros(2,2).long())], 'one class number'),
    ([(torch.zeros(2,3),torch.tensor([0,3]))], 'labels go from 0 to 3, but Identity gives 3 outputs'),
    ([(torch.zeros(2,3),torch.tensor([-1,0]))], 'labels go from -1'),
    ([(torch.zeros(2,3,5),torch.tensor([1,0]))], r'logits of shape \(2, C\)'),
    ([(torch.zeros(3,3),torch.tensor([1,0]))], r'logits of shape \(2, C\)')])
def test_errors(dl, sentence):
    for f in (accuracy_on,uncertainty):
        with pytest.raises(ValueError, match=sentence): f(nn.Identity(), dl)

def test_loaders_instead_of_a_loader():
    with pytest.raises(ValueError, match='such as dls.valid'): uncertainty(nn.Identity(), image_dls())

def test_test_time_augmentation_with_kdnb_data():
    dls = image_dls(pad=1, bs=256)
    learn = Learner(dls, create('lenet300', dls))
    with learn.no_bar(): p,y = learn.tta(n=2)
    assert p.shape==(len(dls.valid.dataset),10) and torch.equal(y.as_subclass(Tensor), dls.valid.dataset.y)
    assert dls.valid.dataset.split_idx==1


def curve(*acc, size='weights', dense=1000):
    n = len(acc)
    return pd.DataFrame([{'sparsity': i/10, size: dense*(10-i)//10, 'accuracy': o} for i,o in enumerate(acc)])

PAPER = 54.07,54.3,54.5,54.2,54.6,54.9,54.8,54.5,54.34,31.   # as ResNet-101 in Malihi and Heidemann 2023, Figure 2: flat, then a fall

@pytest.mark.parametrize('acc, at', [
    (PAPER, .8),
    ([.9], 0.),
    ([.9]*10, .9),                                       # never falls
    ([.9*(10-i)/10 for i in range(10)], .9),             # as fast as size
    ([.5,.6,.7,.8], .3),                                 # rises
    ([.9,.5,.5,.5], 0.),                                 # falls at once
    ([.9,.9,.79,.78], .1),
    ([.9,.7,.9,.7,.9,.6], .4),                           # dips
    ([.9,.9,.6,.7,.6], .1),                              # a dip from which it does not recover altogether
    ([.9,.9,.75,.85,.6], .3),                            # a dip from which it recovers well enough
    ([0.,0.,0.], .2)])
@pytest.mark.parametrize('scale', (1,100))
@pytest.mark.parametrize('size', ('weights','params'))
def test_breakpoint(acc, at, scale, size):
    "Neither units nor order, index, dtype or other columns change it"
    c = curve(*(o*scale for o in acc), size=size)
    assert find_breakpoint(c).sparsity==at
    mixed = c.sample(frac=1, random_state=0).assign(seed=0, note='x').set_index('seed')
    b = find_breakpoint(mixed)
    assert b.sparsity==at and b[size]==1000-1000*at and b.accuracy==pytest.approx(acc[round(at*10)]*scale)

def test_repeats_count_by_their_mean():
    a,b = curve(.9,.95,.7),curve(.9,.75,.9)   # alone at 10 % and 20 %; the mean never falls by more than .05
    assert [find_breakpoint(o).sparsity for o in (a,b,pd.concat([a,b]))]==[.1,.2,.2]
    c = pd.concat([a.assign(weights=a.weights+1), b.assign(weights=b.weights-1)])   # sizes may differ
    assert find_breakpoint(c).weights==800 and find_breakpoint(c).accuracy==pytest.approx(.8)
    dust = pd.concat([curve(.9,.9,.9,.9), curve(.9,.9,.9,.85).assign(sparsity=[0,.1,.2,.1+.2])])
    assert find_breakpoint(dust).sparsity==.3

def test_levels_of_one_size_are_one():
    c = pd.DataFrame(dict(sparsity=[0,.1,.11,.2], weights=[100,90,90,80], accuracy=[.9,.9,.88,.88]))
    assert find_breakpoint(c).weights==80

def test_uneven_steps():
    "A long step may cost more than a short one"
    c = pd.DataFrame(dict(sparsity=[0,.36,.59,.79], weights=[1000,640,410,210], accuracy=[.8,.6,.55,.2]))
    assert find_breakpoint(c).sparsity==.59   # losses .25, .06 and .44 of accuracy; .36, .23 and .2 of weights

def test_weights_come_before_parameters():
    c = curve(.9,.9,.5).assign(params=[1000,999,998])
    assert find_breakpoint(c).sparsity==.1 and find_breakpoint(c).params==999

@pytest.mark.parametrize('c, sentence', [
    (curve(.9,float('nan')), 'not finite'), (curve(.9,float('inf')), 'not finite'),
    (curve(.9,.8).assign(weights=[1000,None]), 'not finite'),
    (curve(.9).drop(columns='weights'), 'It needs sparsity, weights'), (curve(.9).drop(columns='sparsity'), 'It needs'),
    (curve(.9)[:0], '0 rows')])
def test_curves_that_are_none(c, sentence):
    with pytest.raises(ValueError, match=sentence): find_breakpoint(c)


def test_the_plot_marks_what_is_found():
    a,b = curve(.9,.95,.7),curve(.9,.75,.6)
    ax = plot_breakpoint({'teacher': pd.concat([a,b]), 'student': curve(.8,.8,.1, dense=500)})
    t,t_at,s,s_at = ax.lines
    assert t.get_xydata().tolist()==[[1000,90],[900,pytest.approx(85)],[800,pytest.approx(65)]]
    assert t_at.get_xydata().tolist()==[[900,pytest.approx(85)]] and s_at.get_xydata().tolist()==[[450,80]]
    band = ax.collections[0].get_paths()[0].vertices
    assert sorted({(round(x),round(y)) for x,y in band.tolist()})==[(800,60),(800,70),(900,75),(900,95),(1000,90)]
    assert (ax.get_xlabel(),ax.get_ylabel())==('remaining weights','accuracy (%)')
    assert [o.get_text() for o in ax.get_legend().get_texts()]==['teacher, breakpoint at 10 % sparsity',
                                                                 'student, breakpoint at 10 % sparsity']
    own = plt.subplots()[1]
    assert plot_breakpoint(curve(.9,.9, size='params'), ax=own) is own and own.get_xlabel()=='remaining parameters'
    plt.close('all')

def test_the_picture_repeats():
    torch.manual_seed(0)
    x,y = torch.randn(60,5),torch.randint(3, (60,))
    models,dl = dict(a=nn.Linear(5,3), b=nn.Linear(5,3)),batches(x, y)
    def points(**kwargs):
        axs = plot_predictions(models, dl, **kwargs); plt.close('all')
        return axs,[torch.cat([torch.tensor(o.get_offsets().data) for o in ax.collections]) for ax in axs]
    axs,first = points(n=40)
    torch.rand(3); np.random.rand(3)
    assert all(torch.equal(a, b) for a,b in zip(first, points(n=40)[1])) and [len(o) for o in first]==[40,40]
    assert not torch.equal(first[0], points(n=40, seed=1)[1][0])
    titles = [f'{k}\nuncertainty {100*uncertainty(m, dl):.2f} · 10⁻²' for k,m in models.items()]
    assert [ax.get_title() for ax in axs]==titles
    axs,few = points(n=1000, classes=[0,2])
    assert len(few[0])==int((y!=1).sum()) and [o.get_text() for o in axs[-1].get_legend().get_texts()]==['0','2']

def test_pictures_of_odd_networks():
    "One module; a network that says the same to all; few samples"
    x,y = torch.randn(6,5),torch.tensor([0,1,2,0,1,2])
    flat = nn.Linear(5,3); flat.weight.data.zero_()
    ax, = plot_predictions(flat, [(x, y)])
    assert ax.get_title()=='Linear\nuncertainty 0.00 · 10⁻²'
    assert np.isfinite(np.concatenate([o.get_offsets().data for o in ax.collections])).all()
    with pytest.raises(ValueError, match='at least 4'): plot_predictions(flat, [(x, y)], classes=[1])
    plt.close('all')

@pytest.mark.parametrize('change', [lambda m: m, to_variational, lambda m: nn.utils.parametrizations.weight_norm(m.fc1) and m, lambda m: mask_model(m)])
def test_a_layer_with_something_inside_has_one_row(change):
    plain,m = create('lenet300'),create('lenet300')
    rows,want = (cost(o, torch.randn(1,1,28,28), latency=False) for o in (change(m), plain))
    assert list(rows.index)==list(want.index) and list(rows.macs)==list(want.macs)

class Skip(nn.Module):
    def __init__(self): super().__init__(); self.skip,self.conv = nn.Sequential(),nn.Conv2d(1,1,3,padding=1)
    def forward(self, x): return self.skip(x)+self.conv(x)

def test_a_block_whose_first_part_is_empty_has_no_row():
    m = nn.Sequential(Skip(), nn.Flatten(), nn.Linear(64,2))
    assert list(cost(m, torch.randn(1,1,8,8)).index)==['0.conv','2','total']

class Dot(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(7))
    def forward(self, x): return x@self.w

@pytest.mark.parametrize('m, shape, want', [
    (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1), (5,16), 5*(4*16*16+2*16*32) + 2*5*5*16),
    (nn.LSTM(8, 16, batch_first=True, bidirectional=True), (5,8), 5*2*(64*8+64*16)), (Dot(), (3,7), 21), (Dot(), (7,), 7)])
def test_macs_see_what_is_fused_or_is_no_matrix(m, shape, want):
    fused = torch.backends.mha.get_fastpath_enabled()
    for o in (m, m.requires_grad_(False)): assert macs(o, torch.randn(2,*shape))['']==want
    assert torch.backends.mha.get_fastpath_enabled()==fused

def test_cost_counts_what_acts():
    m = mask_model(nn.Sequential(nn.Linear(4,4)), {'0.weight': torch.eye(4)})
    assert list(cost(m, torch.randn(2,4), latency=False).nonzero)==[8,8]
    m = nn.Sequential(nn.Conv2d(1,2,3), nn.BatchNorm2d(2, affine=False))
    assert list(cost(m, torch.randn(2,1,8,8), latency=False)['shape'])==['2×1×3×3','','']

def test_what_layers_share_counts_once():
    m = nn.Sequential(nn.Linear(4,4), nn.Linear(4,4), nn.Linear(4,4))
    m[1].weight = m[0].weight
    assert (n_weights(m), n_weights(nn.Sequential(*map(nn.utils.parametrizations.weight_norm, (nn.Linear(4,4),nn.Linear(4,4))))))==(32,32)
    prune_model(m, .25)
    assert sparsity(m)==.25 and cost(m, torch.randn(2,4), latency=False).weights['total']==32

class Twice(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(4,4)
    def forward(self, x): return self.fc(input=self.fc(x))

def test_a_layer_that_runs_twice_has_one_row_and_its_arguments():
    c = cost(Twice(), torch.randn(3,4), rounds=3)
    assert list(c.index)==['fc','total'] and list(c.macs)==[32,32] and c.ms['fc']>0

def test_inputs_leave_random_numbers_alone():
    dls = DataLoaders.from_dsets(torch.randn(9,4), torch.randn(0,4), bs=4, shuffle=True)
    def state(): return random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist(),dls.train.rng.getstate()
    before = state()
    inputs(dls)
    assert state()==before
