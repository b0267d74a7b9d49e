"Networks on the hub, in timm and in fastai's pickle: what comes back is the same, and what could not be opened is said."
import subprocess, sys
from shutil import copytree

import huggingface_hub
import pytest
import timm
from common import X, Y, data, seeded
from kdnb.all import *

def learner():
    dls = data()
    learn = seeded(dls, create('lenet5', dls))
    prune_model(learn.model, .5)
    return learn

def test_a_folder_as_on_the_hub(tmp_path):
    learn = learner()
    folder = save_pretrained(learn, tmp_path/'small')
    net,x = from_pretrained(folder),torch.randn(3,1,8,8)
    assert torch.equal(net(x), plain_copy(learn.model).cpu().eval()(x)) and {o.name for o in folder.iterdir()}=={'model.safetensors','config.json','README.md'}
    card = (folder/'README.md').read_text()
    assert "from_pretrained('small')" in card and 'It tells apart: 0, 1' in card and 'library_name: kdnb' in card

def test_push_hands_over_the_folder(tmp_path, monkeypatch):
    seen = {}
    def create_repo(self, repo_id, **kwargs): seen.update(repo=repo_id, private=kwargs.get('private')); return type('R', (), dict(repo_id=repo_id))
    def upload_folder(self, folder_path, **kwargs): copytree(folder_path, tmp_path/'hub'); return 'https://hub/commit'
    for f in (create_repo,upload_folder): monkeypatch.setattr(huggingface_hub.HfApi, f.__name__, f)
    learn,x = learner(),torch.randn(3,1,8,8)
    assert push(learn, 'me/small', private=True)=='https://hub/commit' and seen==dict(repo='me/small', private=True)
    assert "from_pretrained('me/small')" in (tmp_path/'hub'/'README.md').read_text()
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda repo, name, **kw: str(tmp_path/'hub'/name))
    monkeypatch.setattr('huggingface_hub.hub_mixin.hf_hub_download', lambda repo_id, filename, **kw: str(tmp_path/'hub'/filename))
    assert torch.equal(from_pretrained('me/small', revision='v1')(x), plain_copy(learn.model).cpu().eval()(x))

def test_what_is_not_there_or_something_else(tmp_path):
    (tmp_path/'text').write_text('no zip')
    with pytest.raises(ValueError, match='text is no file of torch.save'): needs_of(tmp_path/'text')
    for o in (tmp_path/'none', './none'):
        with pytest.raises(ValueError, match='none is no folder, and not the name of a network'): from_pretrained(o)
    with pytest.raises(ValueError, match='is a folder. Name the file'): load_model(tmp_path)

def test_networks_of_one_s_own_are_built_by_the_reader(tmp_path):
    def build(n): return nn.Sequential(nn.Flatten(), nn.Linear(64, n))
    save_pretrained(build(3), tmp_path/'own', data(), dict(name='own', kwargs=dict(n=3)))
    assert 'build=make_network' in (tmp_path/'own'/'README.md').read_text()
    assert from_pretrained(tmp_path/'own', build)[1].out_features==3
    with pytest.raises(ValueError, match='no network is called'): from_pretrained(tmp_path/'own')
    with pytest.raises(ValueError, match='holds no model.safetensors'): from_pretrained(tmp_path)

ALONE = """
import sys; sys.modules.update(kdnb=None, fastai=None)
import timm, torch
net = timm.create_model(sys.argv[1], pretrained=True).eval()
x,y = torch.load(sys.argv[2])
assert torch.equal(net(x), y)
"""
@torch.no_grad()
def narrowed(name, zero, **kwargs):
    m = timm.create_model(name, num_classes=3, **kwargs).eval()
    zero(m)
    x = torch.randn(2, *m.pretrained_cfg['input_size'])[:,:,:64,:64] if 'resnet' in name else torch.randn(2, *m.pretrained_cfg['input_size'])
    return shrink(m, x),x

def half(m):
    for b in m.blocks: b.mlp.fc2.weight[:,:50] = 0

def uneven(m): m.blocks[0].mlp.fc2.weight[:,:50] = 0

@pytest.mark.long
def test_timm_alone_loads_what_its_arguments_say(tmp_path):
    small,x = narrowed('test_vit', half)
    where = to_timm(small, tmp_path/'vit')
    torch.save((x, small(x)), tmp_path/'xy.pt')
    done = subprocess.run([sys.executable, '-c', ALONE, where, tmp_path/'xy.pt'], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    assert timm_args(small, 'test_vit', num_classes=3)['mlp_ratio']==pytest.approx((192-50+.5)/64)
    with pytest.raises(ValueError, match=r'timm has no arguments for the widths of this test_vit: blocks.0.mlp.fc1.weight is \(142, 64\)'):
        to_timm(narrowed('test_vit', uneven)[0], tmp_path/'no')
    with pytest.raises(ValueError, match='does not say what timm calls it'): to_timm(nn.Linear(2,2), tmp_path/'no')
    assert not (tmp_path/'no').exists()

def test_a_residual_network_with_narrower_blocks(tmp_path):
    def zero(m):
        for stage in (m.layer1,m.layer2,m.layer3,m.layer4):
            for b in stage: b.conv2.weight[:,::2] = 0
    small,x = narrowed('resnet18', zero)
    assert timm_args(small, 'resnet18', num_classes=3)==dict(num_classes=3, block_reduce_first=2)
    assert torch.equal(timm.create_model(to_timm(small, tmp_path/'r'), pretrained=True).eval()(x), small(x))

OPENS = """
import sys; sys.modules['kdnb'] = None
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
import torch; print(learn.model(torch.ones(1,1,8,8)).argmax().item())
"""
@pytest.mark.long
def test_an_exported_learner_says_what_it_needs(tmp_path):
    with pytest.warns(UserWarning, match='opens only where kdnb is installed: it holds kdnb.data'):
        learn = learner()
        learn.path = tmp_path
        learn.export()
    items = [*zip(X[:40].float(), Y[:40])]
    dls = Datasets(items, [[ItemGetter(0)],[ItemGetter(1)]], splits=[range(20),range(20,40)]).dataloaders(bs=20, device='cpu')
    own = Learner(dls, create('lenet5', in_shape=(1,8,8)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    with own.no_bar(),own.no_logging():
        own.fit(1)
        small = own.compress_to(macs=.5, how='uniform', n_epoch=1, update_bn=1).learn
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small.export('small.pkl')
    assert needs_of(tmp_path/'small.pkl')==[]
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', OPENS, tmp_path/'small.pkl'], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    with torch.no_grad(): assert int(done.stdout)==small.model(torch.ones(1,1,8,8)).argmax().item()
