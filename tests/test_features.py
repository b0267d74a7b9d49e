"What layers say is heard as they said it, and nothing is left behind."
from copy import deepcopy

import pytest
from kdnb.all import *

def test_no_hook_is_left_by_inputs_that_do_not_fit():
    m = nn.Sequential(nn.Conv2d(1,2,3), nn.ReLU(), nn.Flatten(), nn.Linear(72,3))
    with pytest.raises(RuntimeError): hear(m, ['0'], torch.randn(2,1,9,9))
    with pytest.raises(RuntimeError): Capture(m, ['0'], (torch.randn(2,1,9,9),))
    assert not m[0]._forward_hooks
    m(torch.randn(2,1,8,8)); deepcopy(m)

def test_dropout_in_place_is_not_heard():
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
