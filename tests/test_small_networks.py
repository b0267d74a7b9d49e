"What is shipped in models/ is small, and as good as its report says"
import json
from pathlib import Path

import pytest
import torch
from fastcore.test import *

from kdnb.all import *

MODELS = Path(__file__).parent.parent/'models'
SHIPPED = sorted(MODELS.glob('*.safetensors'))
MOST = dict(mnist_lenet300=.02, mnist_lenet5_caffe=.005)     # part of the dense network's weights

def report(path): return json.loads(path.with_suffix('.json').read_text())

def test_every_network_has_a_report(): assert {o.stem for o in SHIPPED}=={o.stem for o in MODELS.glob('*.json')}

@pytest.mark.parametrize('path', SHIPPED, ids=lambda o: o.stem)
def test_size(path):
    r,model = report(path),load_model(path)
    arch,last = read_header(path)[0]['arch'],r['stages'][-1]
    dense = create(arch['name'], **arch['kwargs'])
    assert path.stat().st_size==r['file_bytes']<150_000
    assert n_weights(model, nonzero=True)==last['weights']<=MOST.get(path.stem, .05)*n_weights(dense)
    test_close(last['weights_kept'], last['weights']/n_weights(dense), 1e-9)
    test_eq(macs(model, torch.zeros(1, 1, 28, 28))[''], last['macs'])

@pytest.mark.mnist
@pytest.mark.parametrize('path', SHIPPED, ids=lambda o: o.stem)
def test_accuracy(path):
    "From bytes, as a user has them"
    model,said = load_model(path),report(path)['stages'][-1]['test_accuracy']
    dl = image_dls(report(path)['data'], device='cpu').test
    test_close(accuracy_on(model, dl), said, 2e-3)      # normalised by another training split
    batches = zip(dl.dataset.x.split(500), dl.dataset.y.split(500))
    test_close(accuracy_on(model, ((model.preprocess(x), y) for x,y in batches)), said, 2e-4)
