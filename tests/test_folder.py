"Folders of a user's own images: every layout gives the right image with the right label, and what is wrong is said."
import shutil

import pandas as pd
import pytest
from PIL import Image
from common import X, Y
from kdnb.all import *

def digit(i, f, wh=(8,8), mode='L'):
    f.parent.mkdir(parents=True, exist_ok=True)
    img = Image.fromarray(X[i,0].numpy()).convert(mode)
    (img if wh==img.size else img.resize(wh)).save(f)

@pytest.fixture
def classes(tmp_path):
    "The first 200 digits, in class folders"
    for i in range(200): digit(i, tmp_path/f'set/{int(Y[i])}/{i:03}.png')
    return tmp_path/'set'

def whole(dls): return {tuple(x.flatten().tolist()): int(y) for dl in dls.loaders for x,y in zip(dl.dataset.x, dl.dataset.y)}
EXPECTED = {tuple(x.flatten().tolist()): int(y) for x,y in zip(X[:200], Y[:200])}
def sizes(dls): return [len(o.dataset) for o in dls.loaders]

def test_class_folders(classes):
    dls = image_dls(classes)
    assert whole(dls)==EXPECTED and len(dls.loaders)==3 and list(dls.vocab)==list('0123456789')
    assert 35<=len(dls.test.dataset)<=45 and torch.bincount(dls.test.dataset.y, minlength=10).min()>=3
    again = folder_dls(str(classes), bs=7)
    assert all(torch.equal(a.dataset.x, b.dataset.x) for a,b in zip(dls.loaders, again.loaders))
    assert len(folder_dls(classes, test_pct=0).loaders)==2

@pytest.mark.parametrize('valid', ['valid', 'val', None])
@pytest.mark.parametrize('test', ['test', None])
def test_split_folders(tmp_path, valid, test):
    where = lambda i: test if test and i%5==0 else valid if valid and i%5==1 else 'train'
    for i in range(200): digit(i, tmp_path/where(i)/str(int(Y[i]))/'images'/f'{i:03}.png')
    dls = folder_dls(tmp_path)
    assert whole(dls)==EXPECTED and len(dls.loaders)==2+bool(test)
    if valid: assert sizes(dls)[1]==40
    if test: assert sizes(dls)[2]==40

@pytest.mark.parametrize('split', [None, ['train','val','test','']])
def test_labels_csv(tmp_path, split):
    for i in range(200): digit(i, tmp_path/f'images/{i:03}.png')
    df = pd.DataFrame(dict(name=[f'images/{i:03}.png' for i in range(200)], label=[f'class {int(y)}' for y in Y[:200]]))
    if split: df['split'] = [split[i%4] for i in range(200)]
    df.to_csv(tmp_path/'labels.csv', index=False)
    dls = folder_dls(tmp_path)
    assert whole(dls)==EXPECTED and dls.vocab[3]=='class 3'
    if split: assert sizes(dls)==[100,50,50]
    assert whole(folder_dls(tmp_path/'labels.csv'))==EXPECTED

def test_sizes_and_colours(tmp_path):
    for i in range(60): digit(i, tmp_path/f'{i%2}/{i:03}.png', wh=(8,8) if i%3 else (16,12), mode='RGB' if i==7 else 'L')
    with pytest.raises(ValueError, match=r'2 sizes, from 8×8 \(.*\) to 16×12 .*size=64'): folder_dls(tmp_path)
    assert folder_dls(tmp_path, size=8).in_shape==(3,8,8)          # one of them has colours
    assert folder_dls(tmp_path, size=(10,12)).in_shape==(3,10,12)
    (tmp_path/'1'/'007.png').unlink()
    assert folder_dls(tmp_path, size=8).in_shape==(1,8,8)

def test_a_turned_photograph_stands_upright(tmp_path):
    pixels = np.zeros((8,16), np.uint8); pixels[:,:4] = 255        # the left is bright
    exif = Image.Exif(); exif[0x112] = 6                           # turn it by 90° clockwise
    for i in range(20):
        (tmp_path/str(i%2)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path/str(i%2)/f'{i}.png', exif=exif)
    x = folder_dls(tmp_path).train.dataset.x[0,0]
    assert x.shape==(16,8) and x[:4].min()==255 and x[4:].max()==0

def test_what_is_no_image_is_left_out_and_said(classes):
    (classes/'0'/'notes.txt').write_text('hello'); (classes/'0'/'.DS_Store').touch(); (classes/'README.md').touch()
    with pytest.warns(UserWarning, match=r'left out of .*, 2 that are no images in class folders: README.md, notes.txt'):
        assert whole(folder_dls(classes))==EXPECTED

def broken(f): f.write_bytes(f.read_bytes()[:60])

@pytest.mark.parametrize('spoil,says', [
    (lambda o: broken(next((o/'3').iterdir())), r'\.png is corrupt or no image'),
    (lambda o: (o/'empty').mkdir(), 'class folder .*empty holds no image'),
    (lambda o: Image.fromarray(np.zeros((8,8), np.uint16)).save(o/'0'/'deep.png'), 'deep.png .*16 or 32 bit'),
    (lambda o: [shutil.rmtree(o/str(i)) for i in range(1,10)], "'0' only: there is nothing to tell apart"),
    (lambda o: (o/'0').rename(o.parent/'x') and shutil.rmtree(o) or (o.parent/'x').rename(o), 'neither class folders'),
    (lambda o: (o/'labels.csv').write_text('a,b\n1,2'), 'has the columns a, b, but no label and no name'),
    (lambda o: (o/'labels.csv').write_text('name,label\nno.png,2'), '1 of the 1 files .* not there: no.png'),
    (lambda o: (o/'labels.csv').write_bytes(b'\xff\xfe\x00bad'), 'no readable table'),
    (lambda o: (o/'labels.csv').write_text(f'name,label\n{next((o/"0").iterdir()).relative_to(o)},'), 'no label for'),
    (lambda o: (o/'labels.csv').write_text('name,label,split\n'+f'{next((o/"0").iterdir()).relative_to(o)},a,dev'), "split 'dev', expected"),
], ids=lambda o: o.replace(' ','-')[:20] if isinstance(o, str) else '')
@pytest.mark.filterwarnings('ignore:left out')
def test_faults_are_sentences(classes, spoil, says):
    spoil(classes)
    with pytest.raises(ValueError, match=says): folder_dls(classes)

def test_all_corrupt_images_are_named_at_once(classes):
    "Those that cannot be opened, and those that break off only when all pixels are read"
    files = sorted(classes.rglob('*.png'))
    files[3].write_bytes(b'no image'); files[5].write_bytes(b'')
    files[80].write_bytes(files[80].read_bytes()[:60]); Image.fromarray(np.zeros((8,8), np.uint16)).save(files[9])
    with pytest.raises(ValueError, match='4 of 200 files are corrupt or no images') as e: folder_dls(classes)
    assert all(str(files[i]) in str(e.value) for i in (3,5,80,9)) and str(e.value).count(files[3].name)==1
    for f in files[::8]: f.write_bytes(b'no image')
    with pytest.raises(ValueError, match='28 of 200 files .* and 8 more. Replace or remove them'): folder_dls(classes)
    for f in (*files[::8], files[3], files[5], files[9]): f.unlink(missing_ok=True)
    files[81].write_bytes(files[81].read_bytes()[:60]); files[80].write_bytes(files[81].read_bytes())       # headers are whole
    with pytest.raises(ValueError, match='2 of 173 files'): folder_dls(classes)

def test_splits_that_do_not_fit(tmp_path):
    for i in range(20): digit(i, tmp_path/f'test/{i%2}/{i}.png')
    with pytest.raises(ValueError, match='has test but no images to train on'): folder_dls(tmp_path)
    for i in range(20): digit(i, tmp_path/f'train/{i%2+1}/{i}.png')
    with pytest.raises(ValueError, match="class '0' is in test but not in train"): folder_dls(tmp_path)
    with pytest.raises(ValueError, match='no folder either'): image_dls(tmp_path/'nowhere')

def test_data_table(tmp_path, monkeypatch):
    monkeypatch.setenv('KDNB_DATA', str(tmp_path))
    df = data_table()
    assert list(df.index)==list(image_sets) and df.state['mnist']=='missing'
    (tmp_path/'MNIST'/'raw').mkdir(parents=True); (tmp_path/'MNIST'/'raw'/'train-labels-idx1-ubyte.gz').write_bytes(b'x')
    assert data_table().state['mnist'].startswith('INCOMPLETE, missing train-images')

@pytest.mark.mnist
def test_data_table_checks_sums(data_dir, tmp_path):
    shutil.copytree(data_dir/'MNIST', tmp_path/'MNIST', copy_function=shutil.copyfile)
    assert data_table(tmp_path).state['mnist']=='checksums right'
    with open(tmp_path/'MNIST'/'raw'/'t10k-labels-idx1-ubyte.gz', 'ab') as f: f.write(b'x')
    assert data_table(tmp_path).state['mnist']=='CORRUPT: t10k-labels-idx1-ubyte.gz'

def test_files_that_the_table_does_not_name(classes):
    names = [o.relative_to(classes) for o in sorted(classes.rglob('*.png'))]
    pd.DataFrame(dict(name=names, label=[o.parent.name for o in names])).iloc[:198].to_csv(classes/'labels.csv', index=False)
    with pytest.warns(UserWarning, match='2 that are not in labels.csv'): assert sum(sizes(folder_dls(classes)))==198
