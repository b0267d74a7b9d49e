"A saved network comes back bit for bit; whatever else is in a file ends in a ValueError or SafetensorError."
import json, random, struct

import pytest
import safetensors.torch as st
from safetensors import SafetensorError
from kdnb.all import *

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    set_seed(0)
    m = lenet5(in_shape=(1,12,12))
    with torch.no_grad():
        m.fc1.weight[:,:18] = 0; m.fc1.weight[:,40:45] = 0; m.fc2.weight[:,:20] = 0
    small = shrink(m, torch.randn(2,1,12,12)).eval()
    return small,save_model(small, tmp_path_factory.mktemp('saved')/'small.safetensors')

def test_round_trip(saved):
    small,path = saved
    back,x = load_model(path),torch.randn(5,1,12,12)
    assert torch.equal(back(x), small(x)) and not back.training
    assert [k for k,_ in back.named_modules()]==[k for k,_ in small.named_modules()]
    back.train()(x).sum().backward()
    assert all(p.grad is not None for p in back.parameters())
    assert [p.name for p in path.parent.iterdir()]==['small.safetensors']       # nothing half-written beside it

def rewrite(path, tmp_path, header=None, tensors=None, sha=True):
    "The file with parts of its header or its tensors changed, and (if `sha`) a checksum that fits"
    h,ts = read_header(path)[0],st.load_file(path)
    ts = {k: v for k,v in (ts | (tensors or {})).items() if v is not None}
    h = h | (header or {})
    if sha: h['sha256'] = hashlib.sha256(st.save(ts)).hexdigest()
    new = tmp_path/'changed.safetensors'
    new.write_bytes(st.save(ts, metadata=dict(kdnb=json.dumps(h))))
    return new

import hashlib

@pytest.mark.parametrize('change,says', [
    (dict(header=dict(format='kdnb-0')), 'is not of format'),
    (dict(header=dict(arch=dict(name='os.system', kwargs={}))), 'no network is called'),
    (dict(header=dict(arch=dict(name='lenet5', kwargs=dict(layers=3)))), 'cannot be built'),
    (dict(header=dict(arch='lenet5')), 'does not name its architecture'),
    (dict(header=dict(input=[1,8,8])), 'do not fit each other'),
    (dict(header=dict(input=[10**9])), 'the input shape'),
    (dict(header=dict(sha256='0'*64), sha=False), 'is corrupt'),
    (dict(tensors={'fc3.bias': torch.zeros(11)}), 'allows at most'),
    (dict(tensors={'fc3.bias': torch.zeros(10, dtype=torch.long)}), 'allows at most'),
    (dict(tensors={'fc3.bias': None}), 'is missing'),
    (dict(tensors={'extra': torch.zeros(1)}), 'is too much'),
    (dict(tensors={'conv1.0.index': torch.zeros(1).long()}), 'belongs to no linear layer'),
    (dict(tensors={'fc1.0.index': torch.tensor([3,2,1])}), 'count upwards'),
    (dict(tensors={'fc1.0.index': torch.tensor([-1,2])}), 'count upwards'),
    (dict(tensors={'fc1.0.index': torch.tensor([0,10**6])}), 'count upwards'),
    (dict(tensors={'fc2.bias': torch.zeros(3)}), 'do not fit each other')])
def test_a_stranger_s_file(saved, tmp_path, change, says):
    with pytest.raises(ValueError, match=says): load_model(rewrite(saved[1], tmp_path, **change))

def test_mutations(saved, tmp_path):
    good,rng,f = saved[1].read_bytes(),random.Random(0),tmp_path/'bad.safetensors'
    n,ended = struct.unpack('<Q', good[:8])[0],{}
    for i in range(600):
        b = bytearray(good)
        for _ in range(rng.randint(1, 4)): b[rng.randrange(8+n if i%2 else len(b))] = rng.randrange(256)
        if i%7==0: b = b[:rng.randrange(len(b))]
        if i%11==0: b[:8] = struct.pack('<Q', rng.choice([0, 2**63, n+1, n-1, 10**12]))
        f.write_bytes(b)
        try: load_model(f); how = 'loaded'
        except (ValueError,SafetensorError) as e: how = type(e).__name__
        ended[how] = ended.get(how, 0)+1
    assert ended.get('loaded', 0) < 30 and ended['ValueError'] > 50 and ended['SafetensorError'] > 50, ended

def test_refuses_what_is_not_plain(tmp_path):
    with pytest.raises(ValueError, match='still has Gate layers'): save_model(to_variational(lenet300()), tmp_path/'a')
    with pytest.raises(ValueError, match='does not say how to build it'): save_model(nn.Linear(2,2), tmp_path/'a')
    assert not list(tmp_path.iterdir())

def test_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    f = tmp_path/'a.txt'
    atomic_write(f, 'old')
    def full(fd): raise OSError('No space left on device')
    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(OSError): atomic_write(f, 'new')
    assert f.read_text()=='old' and len(list(tmp_path.iterdir()))==1

def mine(width=6):
    m = nn.Sequential(nn.Conv2d(3,width,3,groups=3), nn.PReLU(width), nn.ConvTranspose2d(width,6,3), nn.InstanceNorm2d(6, affine=True),
                      nn.Conv2d(6,6,3), nn.BatchNorm2d(6, affine=False), nn.Conv2d(6,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3))
    m[8].register_buffer('scale', torch.ones(2), persistent=False)
    return m

def test_layers_of_every_kind_know_their_sizes(tmp_path):
    m,x = mine().eval(),torch.randn(2,3,12,12)
    with torch.no_grad(): m[4].weight[1] = m[4].bias[1] = m[9].weight[:,0] = m[6].weight[:,1] = 0
    arch = dict(name='mine', kwargs={})
    for o in (m, shrink(m, x).eval()):
        back = load_model(save_model(o, tmp_path/'a', arch=arch), build=mine)
        assert torch.equal(back(x), o(x)) and str(back)==str(o) and len(channel_groups(back, x))==len(channel_groups(o, x))
        assert torch.equal(back[8].scale, torch.ones(2))
    assert n_weights(o)<n_weights(m)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.e,self.f,self.d = nn.Embedding(20,8),nn.Linear(8,8),nn.Linear(8,20,bias=False)
        self.d.weight = self.e.weight
    def forward(self, x): return self.d(self.f(self.e(x)))

def test_tied_weights_stay_tied(tmp_path):
    m,x = Tied(),torch.randint(0,20,(2,5))
    m.d.weight.data[:,:2] = 0
    small = shrink(m, x)
    assert n_params(small)==n_params(m) and small.d.weight is small.e.weight
    back = load_model(save_model(m, tmp_path/'a', arch=dict(name='tied', kwargs={})), build=Tied)
    assert back.d.weight is back.e.weight and torch.equal(back(x), m(x))

@pytest.mark.parametrize('change', [lambda m: m.half(), torch.compile, lambda m: prune_model(m, .9)])
def test_half_compiled_and_masked_networks(change, tmp_path):
    m,x = change(create('lenet5')),torch.randn(2,1,28,28)
    back = load_model(save_model(m, tmp_path/'a'))
    for k,v in tensors_of(plain_copy(m)).items(): assert torch.equal(back.state_dict()[k], v)
    assert sparsity(back)==sparsity(unwrap(m))
