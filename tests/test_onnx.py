"A file that is written says what torch says, alone and anywhere; what is not proven is not written."
import itertools, json, re, shutil, subprocess, sys
from copy import deepcopy

import pytest
from kdnb.all import *
from kdnb.export import graph,speed
from kdnb.channels.sizes import output_tensors
from common import Two, X, Y, quiet, seeded

onnx,ort = pytest.importorskip('onnx'),pytest.importorskip('onnxruntime')
pytestmark = pytest.mark.filterwarnings('ignore')
SHAPE = (1,8,8)

def data(**kwargs): return from_arrays(X, Y, device='cpu', **kwargs)     # onnxruntime is asked there

def convs():
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1,8,3,bias=False), bn=nn.BatchNorm2d(8), act=nn.ReLU(), flat=nn.Flatten(), drop=nn.Dropout(), fc=nn.Linear(288,10)))

@pytest.fixture(scope='module')
def learn():
    return quiet(seeded(data(), convs()), 6, 5e-3)

@pytest.fixture
def path(tmp_path): return tmp_path/'net.onnx'

def raw(path, *xb):
    "What onnxruntime says, without our code"
    s = ort.InferenceSession(str(path))
    return s.run(None, {i.name: x.numpy() for i,x in zip(s.get_inputs(), xb)})

@torch.no_grad()
def close(path, net, *xb):
    a,b = net.eval()(*xb),raw(path, *xb)
    return all(relative_difference(torch.tensor(y), x)<=1e-5 for x,y in zip(output_tensors(a), b))

def test_a_masked_network_in_training(learn, path):
    model = prune_model(deepcopy(learn.model), .5).train()
    hooked = model.conv.register_forward_hook(lambda m,x,out: None)
    found = to_onnx(model, learn.dls, path)
    assert found.difference<=1e-5 and found.same==found.samples>=len(learn.dls.valid_ds) and model.training
    for n in (1,3,64): assert close(path, deepcopy(model), torch.randn(n,*SHAPE))
    file = onnx.load(path)
    assert file.opset_import[0].version==18 and found.bytes==path.stat().st_size<4*n_params(model)+3000
    assert {n.op_type for n in file.graph.node}=={'Conv','Relu','Reshape','Gemm'}
    assert not re.search(rb'site-packages|\.py"', path.read_bytes())
    assert sorted(o.name for o in path.parent.iterdir())==['net.onnx','net.py']
    note = json.loads({o.key: o.value for o in file.metadata_props}['kdnb'])
    assert note['classes']==[str(i) for i in range(10)] and note['input']==[1,8,8] and note['div']==255
    assert 'onnxruntime against torch' in repr(found) and 'equal predictions' in repr(found)

class Many(nn.Module):
    def __init__(self, how): super().__init__(); self.a,self.b,self.how = nn.Linear(64,6),nn.Linear(6,3),how
    def forward(self, x):
        f = self.a(x.flatten(1)).relu()
        return dict(features=f, logits=self.b(f)) if self.how=='dict' else (self.b(f), [f]) if self.how=='tuple' else SimpleNamespace(logits=self.b(f))

class Words(nn.Module):
    def __init__(self): super().__init__(); self.e,self.l = nn.Embedding(9,4),nn.Linear(4,3)
    def forward(self, x): return self.l(self.e(x).mean(1))

class Starred(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(2,3)
    def forward(self, *xs): return self.l(torch.cat(xs, 1))

def indexed():
    m = lenet300(in_shape=SHAPE)
    with torch.no_grad(): m.fc1.weight[:,::3] = 0; m.fc2.weight[:,:200] = 0
    return shrink(m.eval(), torch.randn(2,*SHAPE))

image,pair = (lambda: (torch.randn(5,*SHAPE),)),(lambda: (torch.randn(5,1),torch.randn(5,1)))
@pytest.mark.parametrize('build,xb', [
    (indexed, image), (partial(cifar_resnet, in_shape=SHAPE, depth=8, option='A'), image), (partial(Many, 'dict'), image), (partial(Many, 'tuple'), image),
    (partial(Many, 'object'), image), (Two, pair), (Starred, pair), (Words, lambda: (torch.randint(0, 9, (5,7)),)),
    (lambda: lenet300(in_shape=SHAPE).double(), lambda: (torch.randn(5,*SHAPE).double(),)), (lambda: torch.compile(lenet300(in_shape=SHAPE)), image),
    (lambda: lenet300(in_shape=SHAPE).half(), lambda: (torch.randn(5,*SHAPE).half(),))],
    ids='index resnet dict tuple object two starred words double compiled half'.split())
def test_networks(build, xb, path):
    net,xb = build(),xb()
    found = to_onnx(net, xb, path)
    assert found.difference<=1e-5 and found.same==found.samples==5
    if next(net.parameters()).dtype==torch.half: net,xb = net.float(),(xb[0].float(),)
    more = tuple(torch.cat([o,o,o]) for o in xb)
    assert close(path, unwrap(net), *more)
    if isinstance(net, Many): assert [o.name for o in onnx.load(path).graph.output]==dict(dict=['features','logits'], tuple=['output1','output2']).get(net.how, ['output'])

def test_heads_of_a_distillation_stay_behind(path):
    learn = seeded(data(), lenet300(in_shape=SHAPE), cbs=KnowledgeDistillation(lenet300(in_shape=SHAPE, hidden=(200,50)), KD()+FitNet('fc2')))
    quiet(learn, 1)
    assert 'distill_heads' in dict(learn.model.named_children())
    learn.to_onnx(path)
    assert len(onnx.load(path).graph.initializer)<=7 and path.stat().st_size<4*n_params(lenet300(in_shape=SHAPE))+3000

def break_weights(monkeypatch, layer):
    "Let the exporter write other numbers into the weights of `layer`"
    whole = graph._translated
    def broken(*args, **kwargs):
        g = whole(*args, **kwargs)
        w, = (o for o in g.graph.initializer if o.name==f'{layer}.weight')
        a = onnx.numpy_helper.to_array(w)+.01
        w.CopyFrom(onnx.numpy_helper.from_array(a, w.name))
        return g
    monkeypatch.setattr(graph, '_translated', broken)

@pytest.mark.parametrize('layer,named', [('conv','bn'), ('fc','fc')])
def test_the_layer_that_differs_is_named(learn, path, monkeypatch, layer, named):
    break_weights(monkeypatch, layer)
    with pytest.raises(ValueError, match=f'differs from torch .* first at layer {named}\\. Nothing was written'): learn.to_onnx(path)
    assert not [*path.parent.iterdir()]

def test_a_sum_within_a_stage_is_not_its_output(path, monkeypatch):
    "The stages of a ResNet end with an activation behind their sum; none of them is blamed for the last layer"
    break_weights(monkeypatch, 'fc')
    with pytest.raises(ValueError, match='first at layer fc\\.'): to_onnx(cifar_resnet(in_shape=SHAPE, depth=8), torch.randn(2,*SHAPE), path)

class Noise(nn.Module):
    def forward(self, x): return F.dropout(x, .5, training=True)

class Awake(nn.Dropout):
    def train(self, mode=True): self.training = True; return self

class Unknown(nn.Module):
    def forward(self, x): return torch.special.bessel_j1(torch.special.bessel_j0(x))

class Asks(nn.Module):
    def forward(self, x): return x+1 if x.sum()>0 else x

class Sixty(nn.Module):
    def forward(self, x): return x*torch.ones(len(x.expand(2,-1,-1,-1)),1,1,1)

@pytest.mark.parametrize('odd,says', [
    (Noise, 'first at layer 0'), (Awake, '0 stays in training mode'), (Unknown, 'ONNX does not know prims.bessel_j0, prims.bessel_j1'),
    (Asks, 'cannot be exported'), (Sixty, 'its code fixes the number of samples')])
def test_refused(odd, says, path):
    with pytest.raises(ValueError, match=says): to_onnx(nn.Sequential(odd(), nn.Flatten(), nn.Linear(64,10)), torch.randn(2,*SHAPE), path)
    assert not [*path.parent.iterdir()]

def test_ties_are_no_difference(path):
    net = lenet300(in_shape=SHAPE)
    with torch.no_grad(): net.fc3.weight.zero_(); net.fc3.bias.fill_(1.)
    assert to_onnx(net, torch.randn(5,*SHAPE), path).same==5

def test_bad_input(learn, path, monkeypatch):
    def refused(says, *args, **kwargs):
        with pytest.raises(ValueError, match=says): to_onnx(*args, **kwargs)
    net,dls = learn.model,learn.dls
    bare = Learner(dls, net, loss_func=F.cross_entropy); bare.dls = None
    refused('there are no data', bare, None, path)
    refused('there are no data', net, dls.new_empty(), path)
    refused('data is', net, 'digits', path)
    refused('expected', 'net', dls, path)
    refused('is a folder', net, dls, path.parent)
    refused('ends in .onnx', net, dls, path.with_suffix('.pt'))
    refused('still has Group', to_variational(lenet300(in_shape=SHAPE)), dls, path)
    refused('a TorchScript module', torch.jit.trace(lenet300(in_shape=SHAPE), torch.randn(1,*SHAPE)), dls, path)
    for d in (-.1, 5, True, '1%'):
        for int8 in (True, False): refused('expected a fraction', net, dls, path, int8=int8, max_drop=d)
    refused('Pass DataLoaders that have both', net, inputs(dls), path, int8=True)
    path.with_suffix('.py').write_text('print("mine")')
    refused('was not written by to_onnx', net, dls, path)
    assert path.with_suffix('.py').read_text()=='print("mine")' and not path.exists()
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "kdnb\[onnx\]" \(onnxruntime is not installed\)'): learn.to_onnx(path)

def test_int8(learn, path):
    dls = data(pad=1)
    rng,torch_rng = dls.train.rng.getstate(),torch.get_rng_state()
    found = to_onnx(learn.model, dls, path, int8=True, max_drop=.2)
    assert dls.train.rng.getstate()==rng and torch.equal(torch.get_rng_state(), torch_rng)
    xy = [(b[0].as_subclass(Tensor),b[1].as_subclass(Tensor)) for b in in_order(dls.valid)]
    right = [sum(int((torch.tensor(z).argmax(1)==y).sum()) for z,y in zip(zs, (y for _,y in xy)))/len(dls.valid_ds)
             for zs in ([raw(path, x)[0] for x,_ in xy], [learn.model.eval()(x).detach().numpy() for x,_ in xy])]
    assert [found.accuracy,found.before]==pytest.approx(right)
    file = onnx.load(path)
    scales = {o.name: o.dims for o in file.graph.initializer}
    q = [o.input for o in file.graph.node if o.op_type=='DequantizeLinear' and scales.get(o.input[0])]
    assert [8] in [list(scales[o[1]]) for o in q] and [10] in [list(scales[o[1]]) for o in q]      # a scale for each channel
    assert found.bytes<.6*4*n_params(learn.model) and 'in float' in repr(found)
    first = path.read_bytes()
    to_onnx(learn.model, data(pad=1), path, int8=True, max_drop=.2)
    assert path.read_bytes()==first

def test_int8_that_costs_too_much_is_refused(learn, path):
    net = quiet(seeded(data(), lenet300(in_shape=SHAPE)), 5, 5e-3).model
    with torch.no_grad():      # the function stays, its first layer says numbers of very different size
        for t,by in ((net.fc1.weight[:3],1e4), (net.fc1.bias[:3],1e4), (net.fc2.weight[:,:3],1e-4)): t.mul_(by)
    with pytest.raises(ValueError, match=r'int8 costs \d+\.\d\d points of validation accuracy .* and max_drop=0.05 allows 5\.'):
        to_onnx(net, learn.dls, path, int8=True, max_drop=.05)
    assert not [*path.parent.iterdir()]

def alone(folder, code):
    "What `code` prints in a Python that can import neither torch nor this package"
    code = f'import sys; sys.path.insert(0, ""); sys.modules.update(torch=None, kdnb=None, fastai=None, onnx=None)\nimport numpy as np\n{code}'
    return subprocess.run([sys.executable, '-I', '-c', code], cwd=folder, capture_output=True, text=True, check=True).stdout

@pytest.mark.parametrize('int8', [False,True])
def test_the_script_needs_nothing_of_us(learn, path, tmp_path, int8):
    dls = data(vocab=list('abcdefghij'))
    to_onnx(learn.model, dls, path, int8=int8, max_drop=1)
    elsewhere = tmp_path/'else where'
    elsewhere.mkdir()
    for o in (path, path.with_suffix('.py')): shutil.move(o, elsewhere)
    np.save(elsewhere/'x.npy', X[:9].numpy())
    said = alone(elsewhere, "import net; print(*net.predict(np.load('x.npy')))").split()
    net = OnnxNetwork(elsewhere/'net.onnx')
    assert said==['abcdefghij'[i] for i in net(net.preprocess(X[:9])).argmax(1)] and len({*said})>3
    if not int8: assert said==['abcdefghij'[i] for i in learn.model.eval()(net.preprocess(X[:9])).argmax(1)]

@pytest.mark.parametrize('build,make', [(Two, pair), (lambda: nn.Sequential(nn.Linear(4,1)), lambda: (torch.randn(5,4),))], ids=['two inputs','regression'])
def test_a_script_for_what_is_no_image(build, make, path):
    net,xb = build(),make()
    found = to_onnx(net, xb, path)
    lists = ', '.join(f'np.float32({o.tolist()})' for o in xb)
    said,z = json.loads(alone(path.parent, f'import net; print(np.array(net.predict({lists})).tolist())')),net(*xb).detach()
    assert said==z.argmax(1).tolist() if found.same else np.allclose(said[0], z, atol=1e-5)

def test_what_cannot_be_timed_or_written_as_asked(learn, path):
    for kwargs in (dict(batches=0), dict(batches=(1,'2')), dict(rounds=0)):
        with pytest.raises(ValueError, match='expected whole numbers from 1 on'): runtimes(learn, **kwargs)
    with pytest.raises(ValueError, match='Sequential does not take these data: Given groups=1'): to_onnx(learn.model, torch.zeros(2,3,8,8), path)
    with pytest.raises(ValueError, match='opset is 5, and torch writes no less than 18 for this network. Ask for 18.'): to_onnx(learn, None, path, opset=5)
    assert not path.exists()

def test_openvino_is_timed_where_it_is_installed(learn):
    pytest.importorskip('openvino')
    r = runtimes(learn, which=['openvino','openvino int8'], batches=[1,8], rounds=2)
    assert not r.table.note.any() and r.table.same['openvino']==1 and r.table.same['openvino int8']>.8 and (r.table['ms 8']>0).all()

def test_without_openvino_it_is_no_row_unless_it_is_asked_for(learn, monkeypatch):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    assert not [k for k in speed._ways(learn.model, learn.dls) if k.startswith('openvino') and speed._installed(k)]
    r = runtimes(learn, which=['openvino'], batches=[1], rounds=1)
    assert r.table.note['openvino']=='cannot run here: openvino is not installed: pip install openvino (ValueError)' and 'Take eager' in r.advice

@pytest.mark.long
def test_runtimes(learn, monkeypatch):
    def none(net, xb): raise RuntimeError('no compiler\nand much more')
    monkeypatch.setattr(speed, '_compiled', none)
    monkeypatch.setitem(sys.modules, 'openvino', None)
    net = prune_model(deepcopy(learn.model), .5).train()
    r = runtimes(net, learn.dls, dense=learn.model, rounds=3)
    t = r.table
    assert [*t.index]==['dense, eager','eager','channels_last','bf16','torch.compile','onnxruntime','onnxruntime int8'] and net.training
    assert t['note']['torch.compile']=='cannot run here: no compiler (RuntimeError)' and t.drop('torch.compile')['note'].eq('').all()
    for n in (1,64):
        ms = t[f'ms {n}'].drop('torch.compile')
        assert (ms>0).all() and np.allclose(t[f'× {n}'].drop('torch.compile'), ms['dense, eager']/ms) and np.isnan(t[f'ms {n}']['torch.compile'])
    assert t.same['eager']==t.same['onnxruntime']==1 and t.same['onnxruntime int8']>.5
    assert 'no compiler' in repr(r) and r.advice in repr(r) and '<table' in r._repr_html_()
    assert [*runtimes(learn, batches=[2], which=['onnxruntime'], rounds=2).table.columns]==['ms 2','± 2','× 2','same','note']
    with pytest.raises(ValueError, match="no runtime is called 'gpu'. There are eager, "): runtimes(learn, which=['gpu'])

@pytest.mark.parametrize('ms,same,says', [
    (dict(eager=(2,10), onnxruntime=(1,4), **{'onnxruntime int8': (.5,2)}), .975,
     'Take onnxruntime int8 (4 × at batch 1, 5 × at batch 64): it rounds, and 97.5 % of the samples keep their class. Without rounding: onnxruntime (2 × at batch 1, 2.5 × at batch 64).'),
    (dict(eager=(2,10), onnxruntime=(1,20)), 1., 'Take onnxruntime (2 × at batch 1), eager (1 × at batch 64).'),
    (dict(eager=(2,10), onnxruntime=(1.9,9.9)), 1., 'Take eager (1 × at batch 1, 1 × at batch 64).')])
def test_advice(ms, same, says):
    t = pd.DataFrame({f'{k} {n}': {r: dict(zip(('ms','±','×'), (v[i], .1, ms['eager'][i]/v[i])))[k] for r,v in ms.items()} for i,n in enumerate((1,64)) for k in ('ms','±','×')})
    t['same'],t['note'] = [1.]*(len(t)-1)+[same],''
    assert Runtimes(t, (1,64), 3).advice==says

@pytest.mark.long
def test_forms_are_written_down_beside_the_run(learn, tmp_path):
    net = learn.model
    export_form(tmp_path, net, learn.dls, rounds=2)
    small = export_form(tmp_path, net, learn.dls, tmp_path/'small.onnx', int8=True, max_drop=.2, rounds=2)
    found = export_form(tmp_path, net, learn.dls, rounds=2)      # takes the place of the first
    a,b = form_rows(tmp_path)
    assert (a['file'],a['form'],a['bytes'],a['accuracy'])==('small.onnx','ONNX, int8',small.bytes,small.accuracy)
    assert (b['file'],b['form'],b['bytes'],b['accuracy'])==('model.onnx','ONNX',found.bytes,None)
    assert all(r[k]>0 for r in (a,b) for k in ('ms 1','× 1','ms 64','× 64')) and form_rows(tmp_path/'none')==[]
    (tmp_path/'exported.json').write_text('[1]')
    with pytest.raises(ValueError, match='is no list of exported files'): form_rows(tmp_path)

def test_what_only_meets_padding_is_left_out():
    "Every kernel, stride, padding and dilation on small maps: the trimmed convolution computes the same, to the last bit of a sum"
    torch.manual_seed(0)
    trimmed = 0
    for size,k,s,p,d in itertools.product((1,2,3,5), (1,2,3,5), (1,2,3), (0,1,2,3), (1,2)):
        if size+2*p<d*(k-1)+1: continue
        x,w = torch.randn(2,2,size,7).double(),torch.randn(3,2,k,3).double()
        node = onnx.helper.make_node('Conv', ['x','w'], ['y'], kernel_shape=(k,3), strides=(s,1), pads=(p,1,p,1), dilations=(d,1))
        found = graph._trimmed(node, (size,7), w.numpy())
        if found is None: continue
        small,(top,left,bottom,right) = found
        trimmed += 1
        y = F.conv2d(F.pad(x, (left,right,top,bottom)), torch.tensor(small), stride=(s,1), dilation=(d,1))
        torch.testing.assert_close(y, F.conv2d(x, w, stride=(s,1), padding=(p,1), dilation=(d,1)), rtol=1e-12, atol=1e-12)
    assert trimmed>40

def test_a_stage_of_one_pixel_is_a_matrix(path):
    net = nn.Sequential(nn.Conv2d(1,4,3,2,1), nn.Conv2d(4,8,3,2,1), nn.Conv2d(8,8,3,2,1), nn.Conv2d(8,8,3,1,1,groups=2), nn.Flatten())
    found = to_onnx(net, torch.randn(2,*SHAPE), path)
    dims = {tuple(o.dims[2:]) for o in onnx.load(path).graph.initializer if len(o.dims)==4}
    assert dims=={(3,3),(2,2),(1,1)} and found.difference<=1e-5 and close(path, net, torch.randn(5,*SHAPE))
