"What can only fail on a GPU: `KDNB_DEVICE=cuda make test`, or `bench/gpu.sh`."
import random

import pytest
from common import flat, quiet, same, seeded, state
from kdnb.all import *

pytestmark = pytest.mark.cuda

def digits(**kwargs): return image_dls('digits', bs=256, **kwargs)
def net(name='resnet8', dls=None, **kwargs): set_seed(1); return create(name, dls or digits(), **kwargs)

@pytest.fixture(params=[False,True], ids=['fp32','tf32'])
def tf32(request):
    "With and without the rounding that convolutions have by default"
    places = torch.backends.cuda.matmul,torch.backends.cudnn
    old = [o.allow_tf32 for o in places]
    for o in places: o.allow_tf32 = request.param
    yield
    for o,v in zip(places, old): o.allow_tf32 = v

@pytest.mark.parametrize('name', ['lenet5','vgg9','resnet8','wrn_16_1','mobilenet_v2'])
def test_pruned_shrunken_and_trained_on(name, tf32):
    dls = digits()
    learn = seeded(dls, net(name, dls))
    quiet(learn, 1, 1e-3, cbs=Pruner(.5, by='channel'))
    masked,before = plain_copy(learn.model),n_params(learn.model)
    small = learn.shrink()
    assert n_params(small)<.7*before and {p.device for p in small.parameters()}=={dls.device} and max_difference(small, masked, dls)<1e-10
    quiet(learn, 1, 1e-3)

@pytest.mark.parametrize('name,groups', [('lenet300','neurons'), ('lenet5','channels'), ('resnet8','channels')])
def test_variational_training_is_compressed(name, groups, tf32):
    dls = digits()
    learn = seeded(dls, to_variational(net(name, dls), dls, groups), cbs=VariationalSparsifier(gamma_weight=100))
    quiet(learn, 4, 1e-2)
    small = learn.compress()
    assert max_difference(small, to_deterministic(learn.model), dls)<1e-10 and next(small.parameters()).device==dls.device

@pytest.mark.parametrize('cache', [False,True,'folder'])
@pytest.mark.parametrize('terms', ['KD','KD + AT','VID-I','FitNet','CRD','SRRL','SimKD'])
def test_distillation(terms, cache, tmp_path):
    if cache=='folder': cache = tmp_path
    if cache and terms=='SimKD': pytest.skip('its student is another network')
    dls = digits()
    teacher,student = net('resnet14', dls),net('resnet8', dls)
    learn = seeded(dls, student)
    terms = named_term(terms, student, teacher.to(dls.device), dls)
    with learn.no_bar(), learn.no_logging(): kd = learn.distill(teacher, 2, terms, cache=cache)
    assert all(math.isfinite(kd.mean(k)) and kd.mean(k)>0 for k in kd.terms)

@pytest.mark.parametrize('half', [None,'to_fp16','to_bf16'])
def test_a_weight_of_zero_is_plain_training(half):
    def train(*cbs):
        dls = digits()
        learn = seeded(dls, net(dls=dls), cbs=list(cbs))
        if half: getattr(learn, half)()
        return flat(quiet(learn, 2, 1e-3).model)
    set_seed(0, reproducible=True)
    teacher = net('resnet14').to(digits().device)
    assert torch.equal(train(), train(KnowledgeDistillation(teacher, KD()*0., task=1.)))

@pytest.mark.parametrize('half', [None,'to_fp16','to_bf16'])
def test_a_training_that_stopped_goes_on_bit_for_bit(half, tmp_path):
    class StopAt(Callback):
        def before_batch(self):
            if self.training and self.epoch==2: raise KeyboardInterrupt
    def train(folder, *cbs):
        set_seed(0, reproducible=True)
        dls = digits(pad=1)
        dls.train.rng = random.Random(0)
        learn = Learner(dls, net(dls=dls), metrics=accuracy, cbs=[Checkpoint(tmp_path/folder), *cbs])
        if half: getattr(learn, half)()
        return state(quiet(learn, 4, 1e-3).model)
    old,Checkpoint.share = Checkpoint.share,None
    try:
        whole = train('whole')
        with pytest.raises(KeyboardInterrupt): train('stopped', StopAt())
        assert same(train('stopped'), whole)
    finally: Checkpoint.share = old

def test_measuring_waits_for_the_device():
    small,large = latency([net('resnet8').to(digits().device), net('resnet32').to(digits().device)], digits())
    assert 0<small<large
