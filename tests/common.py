"What several test files share: a little data, a learner whose random numbers begin anew, a quiet fit."
import random

import pytest
from kdnb.all import *

X,Y = (o[:201] for o in (image_dls('digits').train.dataset.x, image_dls('digits').train.dataset.y))   # three batches are left for training

def data(**kwargs): return from_arrays(X, Y, **kwargs)

def here(model): "A network where the loaders put their batches"; return model.to(default_device())

def seeded(dls, model, **kwargs):
    "A `Learner` that shuffles and draws as any other made here"
    set_seed(0)
    dls.train.rng = random.Random(0)
    learn = Learner(dls, model, metrics=accuracy, loss_func=CrossEntropyLossFlat(), **kwargs)
    learn.recorder.add_time = False
    return learn

def quiet(learn, *args, fit='fit', **kwargs):
    with learn.no_bar(),learn.no_logging(): getattr(learn, fit)(*args, **kwargs)
    return learn

def flat(model): return nn.utils.parameters_to_vector(model.parameters()).detach()
def state(model): return {k: v.detach().clone() for k,v in unwrap(model).state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@torch.no_grad()
def still(model):
    "A variational network without its noise"
    for n,p in model.named_parameters():
        if n.endswith('logvar'): p.fill_(-200.)
    return model

def rest_long(names, quick):
    "All `names` for `parametrize`, those that are not in `quick` marked long"
    quick = quick.split()
    assert {*quick}<={*names}, quick
    return [n if n in quick else pytest.param(n, marks=pytest.mark.long) for n in names]

class Two(nn.Module):
    "A network of two inputs"
    def __init__(self): super().__init__(); self.l = nn.Linear(2,3)
    def forward(self, a, b): return self.l(torch.cat([a,b], 1))

def per_item():
    "Plain fastai `DataLoaders`, item by item, for `Two`"
    items = [(torch.randn(1),torch.randn(1),torch.tensor(i%3)) for i in range(50)]
    dls = DataLoaders(DataLoader(items, bs=16), DataLoader(items, bs=16))
    dls.n_inp = 2
    return dls

class CPUAutocast(Callback):
    "What fastai's MixedPrecision does on a GPU, in bf16 on the CPU"
    order = 10
    def before_batch(self):
        self.autocast = torch.autocast('cpu', torch.bfloat16)
        self.autocast.__enter__()
    def after_pred(self): self.learn.pred = to_float(self.pred)
    def after_loss(self): self.autocast.__exit__(None, None, None)

ends = pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('boom'), CancelFitException(), CancelEpochException(), CancelTrainException(),
                                         CancelBatchException()], ids=lambda e: type(e).__name__)

class StopAt(Callback):
    "Raise `error` in the second training batch"
    def __init__(self, error): self.error = error
    def after_pred(self):
        if self.training and self.iter==1: raise self.error
