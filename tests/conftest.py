import gc, os
from pathlib import Path

DEVICE = os.environ.get('KDNB_DEVICE', 'cpu')
if DEVICE=='cpu': os.environ['CUDA_VISIBLE_DEVICES'] = ''     # before torch looks: processes that a test starts follow

import pytest
from filelock import FileLock
from xdist import is_xdist_controller

def pytest_sessionstart(session):
    "Where tests run; xdist's first process only deals them out, and its workers wait for it"
    if is_xdist_controller(session): return
    import matplotlib, torch
    from fastai.torch_core import default_device
    matplotlib.use('Agg')
    torch.set_num_threads(1)
    default_device(DEVICE!='cpu')     # where loaders put their batches, and learners their networks
    # the first backward pass starts autograd's threads; within torch.compile it starts some that no fork survives
    torch.ones(1, requires_grad=True).sum().backward()

@pytest.fixture
def data_dir():
    if folder := os.environ.get('KDNB_DATA'): return Path(folder)
    pytest.skip('no image files: set KDNB_DATA to the folder that holds MNIST/')

@pytest.fixture(scope='session')
def two_processes(tmp_path_factory):
    "Folder with the runs of two processes, which are started once for all workers of xdist"
    import two_processes as ddp
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'two_processes'
    with FileLock(f'{folder}.lock'):
        if not folder.exists(): folder.mkdir(); ddp.both(folder)
    return folder

@pytest.fixture(scope='session')
def two_ranks(two_processes):
    "What distillation, variational training and pruning end with in each of the two: `{name: state}`"
    import torch
    return [torch.load(two_processes/f'{i}.pth', weights_only=True) for i in (0,1)]

def pytest_collection_finish():
    "What is imported and collected by now stays: garbage is not looked for among it again and again"
    gc.collect()
    gc.freeze()

def pytest_runtest_setup():
    "A test draws the same numbers whatever ran before it in its process"
    from fastai.torch_core import set_seed
    set_seed(0)

def pytest_collection_modifyitems(items):
    for o in items:
        if o.get_closest_marker('mnist'): o.fixturenames.insert(0, 'data_dir')
        if o.get_closest_marker('cuda') and DEVICE=='cpu': o.add_marker(pytest.mark.skip('needs a GPU: KDNB_DEVICE=cuda make test'))

def pytest_pycollect_makeitem(collector, obj):
    "`from kdnb.all import *` brings fastcore's `test_eq` and our `TestEveryEpoch`: they are no tests"
    if (getattr(obj, '__module__', None) or '').startswith(('fast','kdnb')): return []
