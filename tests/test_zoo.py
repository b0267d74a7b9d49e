"A tenth of the small networks that nobody here wrote, another one each week; all of them: `python tests/zoo.py`."
from datetime import date
import pytest
import zoo

QUICK = ['torchvision/mobilenet_v3_small','torchvision/shufflenet_v2_x0_5','torchvision/squeezenet1_1','torchvision/resnet18','torchvision/mnasnet0_5',
         *(f'timm/{n}' for n in '''test_efficientnet_gn test_efficientnet_evos test_resnet test_byobnet test_convnext test_convnext2 test_convnext3
         test_nfnet test_mambaout test_vit test_vit2 test_vit3 mobilenetv3_small_050 lcnet_050 tinynet_e mnasnet_small ghostnet_100 repghostnet_050
         regnetx_002 dla46x_c mixnet_s convnextv2_atto mobilevitv2_050 rexnet_100 skresnet18'''.split())]

@pytest.mark.parametrize('name', [n for n in zoo.networks() if n in QUICK and zoo.tenth(n, date.today().isocalendar().week)])
def test_networks_of_others(name):
    r = zoo.row(name, ['exact','counted','trains','copies','saves'])
    assert not r['failed'] and all(r[s]=='yes' for s in ('exact','counted','trains','copies','saves')), r
    assert float(r['left'])<.98

def test_rows_are_written_and_read(tmp_path):
    there = [dict.fromkeys(zoo.COLUMNS, '') | dict(network=n, failed='a, "b"') for n in ('torchvision/resnet18','torchvision/alexnet')]
    zoo.write(there, tmp_path/'z.csv')
    assert [r['network'] for r in zoo.rows(tmp_path/'z.csv')]==['torchvision/alexnet','torchvision/resnet18']
    assert sorted(zoo.rows(tmp_path/'z.csv'), key=lambda r: r['network'], reverse=True)==there
    assert sum(zoo.tenth('a', k) for k in range(1, 11))==1
