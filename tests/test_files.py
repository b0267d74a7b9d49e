"What is stored is read again as it was, by this version and by later ones."
import json
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import pytest
import safetensors.torch as st
from kdnb.all import *
from kdnb.files import from_plain, plain_reader, to_plain

def test_a_file_of_the_first_version_is_read(tmp_path):
    "Written out by hand: every kind of entry there was"
    header = {'$dict': [
        ['n', 3], ['inf', float('inf')], [{'$tuple': [1, 2]}, {'$list': [True, None, 'ä']}], ['w', {'$tensor': '0'}], ['a', {'$array': '1'}],
        ['z', {'$long': {'$tensor': '2'}, 'tensors': False}], ['y', {'$long': {'$tensor': '2'}, 'tensors': True}], ['s', {'$strings': ['x','yy']}],
        ['c', {'$dict': [['a', 2]], 'of': 'Counter'}], ['o', {'$dict': [['b', 1]], 'of': 'OrderedDict'}], ['d', {'$dict': [['a', {'$list': [1]}]], 'of': 'list'}],
        ['p', {'$path': 'a/b'}], ['bytes', {'$bytes': '00ff'}], ['complex', {'$complex': [0., 1.]}], ['q', {'$deque': [1,2], 'maxlen': 3}],
        ['set', {'$set': [1,2]}], ['frozen', {'$frozenset': ['a']}], ['L', {'$L': [1,2]}],
        ['df', {'$frame': [['i', {'$list': [1,2]}], ['x', {'$list': [.1,.2]}]], 'index': {'$list': [{'$tuple': ['a',0]}, {'$tuple': ['b',1]}]},
                'names': {'$list': ['n','s']}, 'columns': {'$list': [None]}}]]}
    tensors = {'0': torch.arange(6.).reshape(2,3), '1': torch.arange(3), '2': torch.tensor([.1,.2], dtype=torch.double)}
    st.save_file(tensors, tmp_path/'old', dict(kdnb=json.dumps(header)))
    o = load_state(tmp_path/'old')
    assert o['n']==3 and o['inf']==math.inf and o[1,2]==[True,None,'ä'] and torch.equal(o['w'], tensors['0'])
    assert (o['a']==np.arange(3)).all() and o['z']==[.1,.2] and [t.item() for t in o['y']]==[.1,.2] and o['s'].tolist()==['x','yy']
    for k,v in dict(c=Counter('aa'), o=OrderedDict(b=1), d=defaultdict(list, a=[1]), p=Path('a/b'), bytes=b'\0\xff', complex=1j,
                    q=deque([1,2], maxlen=3), set={1,2}, frozen=frozenset('a'), L=L(1,2)).items(): assert o[k]==v and type(o[k]) is type(v), k
    index = pd.MultiIndex.from_tuples([('a',0),('b',1)], names=['n','s'])
    pd.testing.assert_frame_equal(o['df'], pd.DataFrame([[1,.1],[2,.2]], index=index, columns=['i','x']))
    tensors.clear()
    assert to_plain(o['d'], tensors)==header['$dict'][10][1] and to_plain(o['df'], tensors)==header['$dict'][-1][1]     # and written as it was

class Point:
    def __init__(self, x): self.x = x

def test_a_type_of_one_s_own(tmp_path):
    with pytest.raises(TypeError, match='Point is no plain data'): save_state(tmp_path/'p', [Point(1)])
    assert not (tmp_path/'p').exists()
    to_plain.register(Point)(lambda o, tensors: {'$point': to_plain(o.x, tensors)})
    save_state(tmp_path/'p', [Point(torch.ones(2))])
    with pytest.raises(ValueError, match=r"damaged or was not written by kdnb \(it holds '\$point', and nothing is registered"): load_state(tmp_path/'p')
    plain_reader('$point')(lambda d, tensors: Point(from_plain(d['$point'], tensors)))
    assert torch.equal(load_state(tmp_path/'p')[0].x, torch.ones(2))

@pytest.mark.parametrize('o', [namedtuple('Two', 'a b')(1,2), torch.Size([1]), lambda: 0, nn.Linear(1,1), (o for o in ())], ids=lambda o: type(o).__name__)
def test_what_is_no_plain_data_is_refused(o):
    with pytest.raises(TypeError, match=f'{type(o).__name__} is no plain data'): to_plain(o, {})
