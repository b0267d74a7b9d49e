"The outputs of layers are captured as they were, and no hook is left behind."
from copy import deepcopy

import pytest
from kdnb.all import *

def test_no_hook_is_left_by_inputs_that_do_not_fit():
    m = nn.Sequential(nn.Conv2d(1,2,3), nn.ReLU(), nn.Flatten(), nn.Linear(72,3))
    with pytest.raises(RuntimeError): capture_outputs(m, ['0'], torch.randn(2,1,9,9))
    with pytest.raises(RuntimeError): Capture(m, ['0'], (torch.randn(2,1,9,9),))
    assert not m[0]._forward_hooks
    m(torch.randn(2,1,8,8)); deepcopy(m)

def test_in_place_dropout_does_not_change_what_is_captured():
    m,x = nn.Sequential(nn.Linear(4,6), nn.Dropout(.5, inplace=True), nn.Linear(6,3)).train(),torch.randn(9,4)
    torch.manual_seed(3); before = torch.get_rng_state()
    with Capture(m, ['0'], (x,)) as c:
        assert torch.equal(torch.get_rng_state(), before) and all(o.training for o in m)
        m(x)
        assert torch.equal(c.take()['0'], m[0](x))

class Up(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Conv2d(1,2,3,2,1),nn.Conv2d(2,2,3,2,1),nn.ConvTranspose2d(2,2,2,2)
    def forward(self, x): x = self.a(x); return x+self.c(self.b(x))

def test_the_last_map_of_a_network_that_goes_up_again():
    assert stage_ends(Up(), torch.randn(1,1,8,8))=={(2,2): 'b', (4,4): 'c'} and last_map(Up(), torch.randn(1,1,8,8))=='c'

@pytest.mark.parametrize('name', ['resnet50','mobilenet_v2','shufflenet_v2_x0_5'])
def test_stages_end_at_maps_of_their_size_where_the_network_can_be_cut(name):
    torch.manual_seed(0)
    import torchvision
    m,x = getattr(torchvision.models, name)(weights=None),torch.randn(2,3,64,64)
    ends = stage_ends(m, (x,))
    z,maps = capture_outputs(m, list(ends.values()), (x,))
    assert [tuple(o.shape[2:]) for o in maps.values()]==list(ends)
    if name=='resnet50': assert ends=={(32,32): 'relu', (16,16): 'layer1', (8,8): 'layer2', (4,4): 'layer3', (2,2): 'layer4'}
    for path in list(ends.values())[1:]:
        with evaluating(m), torch.no_grad():
            body,head = cut(m, path)
            torch.testing.assert_close(head(body(x)), z)

class Enclosed(nn.Module):
    "A block that ends in maps of another size, with a whole network in it"
    def __init__(self): super().__init__(); self.body = nn.Sequential(nn.Conv2d(1,2,3,1,1), nn.ReLU(), nn.Conv2d(2,3,3,2,1))
    def forward(self, x): return self.body(x)

def test_stages_within_a_module_around_the_whole_network_are_found():
    m = nn.Sequential(Enclosed(), nn.Flatten(), nn.Linear(48,2))
    assert stage_ends(m, torch.randn(2,1,8,8))=={(8,8): '0.body.1', (4,4): '0'}

def test_old_names():
    assert hear is capture_outputs and answers is activations
