"What VBGS-KD is compared with: groups, their penalty, pruning within a budget"
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastcore.test import *

from kdnb.all import *
from kdnb.recipes.registry import bring

b = bring(str(Path(__file__).parent.parent/'results/vbgs_kd/baselines.py'))

@pytest.fixture(scope='module')
def dls(): return image_dls('digits', device='cpu')

def test_groups_are_what_is_read_together(dls):
    model = create('lenet5', dls)
    groups = b.groups_of(model, dls)
    test_eq([n for n,_ in groups], [6,16,64,120,84])
    test_eq([[p for p,*_ in parts] for _,parts in groups], [['conv2'],['fc1'],['fc1'],['fc2'],['fc3']])
    w = model.fc2.weight
    one = (w.shape[0]**.5*w.norm(dim=0)).sum()
    test_close(b.group_l1(model, groups[3:4]), one, 1e-3)
    channel = model.fc1.weight.view(120, 16, 4).norm(dim=(0,2))      # each read at 2 × 2 places
    test_close(b.norms(model, groups[1:2])[0][0], channel, 1e-5)
    test_eq(b.norms(model, groups[1:2])[1][0], torch.full((16,), 480.))

def test_least_units_are_cut(dls):
    model = create('resnet8', dls)
    groups = b.groups_of(model, dls)
    before = [v/n.sqrt() for v,n in zip(*b.norms(model, groups))]
    limit = torch.cat(before).sort().values[len(torch.cat(before))//4]
    cut = b.cut_groups(deepcopy(model), .25, groups)
    for was,now in zip(before, b.norms(cut, groups)[0]): test_eq(now<1e-5, was<limit)
    assert n_weights(shrink(cut, dls))<.8*n_weights(model)

def test_budget():
    "The sparsest that stays within it, also behind one that does not"
    model = nn.Linear(10, 10, bias=False)
    model.weight.data = torch.eye(10)
    lost = {.25: 1, .5: 4, .75: 2}      # classes
    def cut(copy, level):
        copy.weight.data[-lost[level]:] = 0
        copy.level = level
        return copy
    data = SimpleNamespace(valid=[(torch.eye(10), torch.arange(10))])
    for budget,level in ((.1,.25), (.2,.75), (.4,.75)): test_eq(b.within_budget(model, data, cut, budget+1e-6, .25).level, level)
    assert b.within_budget(model, data, cut, 0., .25) is model

@pytest.mark.long
def test_rows(dls, tmp_path):
    run = b.baselines(dls, 'lenet300', 'lenet5', tmp_path/'run', (1,1,1), show=False, budget=.5, step=.3)
    test_eq([o['name'] for o in run.stages], ['teacher','plain','KD','KD + magnitude','KD + group magnitude','student','L1','KD + L1',
                                              'group L1','KD + group L1'])
    rows = {o['name']: o for o in run.stages}
    assert rows['KD + magnitude']['macs']==rows['KD']['macs']>rows['KD + group magnitude']['macs']
    assert rows['KD + group L1']['weights_kept']<1 and len(rows['KD + group L1']['widths'])==5
    ours = vbgs_kd(dls, 'lenet300', 'lenet5', tmp_path/'ours', (1,1,1), show=False)
    for name in ('teacher','student'): test_eq(rows[name]['valid_accuracy'], {o['name']: o for o in ours.stages}[name]['valid_accuracy'])
    with pytest.raises(ValueError, match="methods names 'L1'"): b.baselines(dls, methods=['L1'], path=tmp_path/'no', show=False)
