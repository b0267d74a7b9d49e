"Image sets: what is read is what is there, splits are fixed, and missing or corrupt files are named."
import gzip, shutil

import pytest
from fastai.vision.all import *
from kdnb.data import *

def test_the_split_is_fixed_and_stratified():
    a,b = image_dls('digits'),image_dls('digits', bs=7)
    for i in range(3): assert torch.equal(a[i].dataset.x, b[i].dataset.x)
    whole = torch.cat([a[i].dataset.x.flatten(1) for i in range(3)])
    assert len(whole)==1797 and len(whole.unique(dim=0))==1797        # every image once
    assert torch.bincount(a.valid.dataset.y).min()>=13

def test_shuffling_follows_the_rng():
    dls = image_dls('digits', index=True)
    def order():
        dls.train.rng = random.Random(3)
        return torch.cat([b[2] for b in dls.train])
    assert torch.equal(order(), order())
    assert not torch.equal(order(), torch.cat([b[2] for b in dls.train]))

def test_items_and_batches_agree():
    dls = image_dls('digits', bs=32, index=True)
    for x,y,i in dls.train:
        assert torch.equal(y, dls.train.dataset.y[i])
        one = dls.train.after_batch((dls.train.dataset[int(i[0])][0][None],))[0]
        assert torch.allclose(one[0], x[0])

def test_drop_last_and_len():
    dls = image_dls('digits', bs=100, drop_last=True)
    assert [len(b[1]) for b in dls.train]==[100]*12 and len(dls.train)==12
    assert sum(len(b[1]) for b in dls.valid)==143

def test_crop_flip_is_training_only_and_keeps_pixels():
    dls = image_dls('digits', pad=2, flip=True)
    assert dls.train.augments and not dls.valid.augments
    x = dls.valid.one_batch()[0]
    assert torch.equal(x, dls.valid.one_batch()[0])
    img = TensorImage(torch.arange(1,26, dtype=torch.uint8).reshape(1,1,5,5).repeat(500,1,1,1))
    out = CropFlip(pad=0, flip=True)(img, split_idx=0)
    kinds = out.flatten(1).unique(dim=0)
    assert len(kinds)==2 and torch.equal(torch.Tensor(kinds.sort(1).values[0].float()), torch.arange(1,26).float())

def test_float_images_and_own_stats():
    x,y = torch.rand(40,3,6,6),torch.arange(40)%4
    dls = from_arrays(x, y, stats=([.5]*3,[.25]*3), vocab=list('abcd'))
    xb,yb = dls.valid.one_batch()
    assert torch.allclose(xb*.25+.5, dls.valid.dataset.x[:len(xb)], atol=1e-6) and list(dls.vocab)==list('abcd')

@pytest.mark.mnist
def test_mnist(data_dir):
    dls = image_dls('mnist', bs=256)
    assert [len(o.dataset) for o in dls.loaders]==[54001,5999,10000] and dls.in_shape==(1,28,28)
    assert torch.bincount(dls.test.dataset.y).tolist()==[980,1135,1032,1010,982,892,958,1028,974,1009]
    assert list(image_dls('fashion_mnist').vocab)[9]=='Boot'

@pytest.mark.mnist
def test_a_corrupt_file_is_named(data_dir, tmp_path):
    shutil.copytree(data_dir/'MNIST', tmp_path/'MNIST')
    f = tmp_path/'MNIST'/'raw'/'t10k-labels-idx1-ubyte.gz'
    f.chmod(0o644)
    f.write_bytes(f.read_bytes()[:-1]+b'x')
    with pytest.raises(ValueError, match='t10k-labels-idx1-ubyte.gz is corrupt'): image_dls('mnist', path=tmp_path)

def test_known_sets_come_in_any_size():
    "Each new pixel is the mean of those it covers; of another shape the middle stays; beyond its size an image is interpolated"
    whole = image_dls('digits')
    for size,hw in ((4,(4,4)), ((4,2),(4,2)), ([2,8],(2,8)), (12,(12,12))):
        dls = image_dls('digits', size=size)
        assert dls.in_shape==(1,*hw) and [len(o.dataset) for o in dls.loaders]==[1295,143,359] and dls.train.dataset.x.dtype==torch.uint8
        assert torch.equal(dls.test.dataset.y, whole.test.dataset.y)
    x = whole.test.dataset.x.float()
    half,strip = (image_dls('digits', size=o).test.dataset.x for o in (4,(4,2)))
    assert torch.equal(half[:,0], torch.stack([x[:,0,i::2,j::2] for i in (0,1) for j in (0,1)]).mean(0).round().byte())
    assert torch.equal(strip, half[...,1:3])
    assert torch.equal(image_dls('digits', size=8).test.dataset.x, whole.test.dataset.x)
    for bad in (0, -1, 2.5, '14', (4,), (4,4,4), (4,0)):
        with pytest.raises(ValueError, match='expected the pixels of an edge'): image_dls('digits', size=bad)

def test_a_folder_is_resized_by_name_too(tmp_path):
    from PIL import Image
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(20): Image.new('L', (8,8), i).save(tmp_path/c/f'{i}.png')
    assert image_dls(tmp_path, size=4).in_shape==folder_dls(tmp_path, size=4).in_shape==(1,4,4)
    with pytest.raises(ValueError, match="size is 'small', expected the pixels"): image_dls(tmp_path, size='small')

@pytest.mark.mnist
def test_mnist_at_half_the_edge(data_dir):
    a,b = image_dls('fashion_mnist').test.dataset.x,image_dls('fashion_mnist', size=14).test.dataset.x
    assert torch.equal(b, F.avg_pool2d(a.float(), 2).round().byte())

def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='Set KDNB_DATA'): image_dls('cifar10_jpeg', path=tmp_path)

@pytest.mark.mnist
def test_cifar10_jpeg(data_dir, tmp_path, monkeypatch):
    "The order of the original set, decoded from a few files of the archive"
    import io, tarfile
    from kdnb import data
    labels = np.load(data_dir/'cifar10-labels-original-order.npz')
    with tarfile.open(data_dir/'cifar10-jpeg.tar.xz') as t: first = next(m for m in t if m.name.endswith('.jpg')); img = t.extractfile(first).read()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    names = sorted(data._cifar_names)
    with tarfile.open(tmp_path/'cifar10-jpeg.tar.xz', 'w:xz') as t:
        for split,y in (('train', [3,1,1,3]), ('test', [1,3])):
            for c in (1,3):
                for k in range(sum(o==c for o in y)):
                    info = tarfile.TarInfo(f'cifar10-jpeg/{split}/{names[c]}/{k:04}.jpg'); info.size = len(img)
                    t.addfile(info, io.BytesIO(img))
    np.savez(tmp_path/'cifar10-labels-original-order.npz', train=np.array([1,0,0,1], dtype=np.uint8), test=np.array([0,1], dtype=np.uint8))
    md5 = hashlib.md5((tmp_path/'cifar10-jpeg.tar.xz').read_bytes()).hexdigest()
    (tmp_path/'MD5SUMS').write_text(f'{md5}  ./cifar10-jpeg.tar.xz\n')
    for _ in range(2):                                            # the second time from the cache
        x,y,xt,yt = data._cifar10_jpeg(tmp_path)
        assert x.shape==(4,3,32,32) and y.tolist()==[1,0,0,1] and xt.shape==(2,3,32,32)
    assert labels['train'].shape==(50000,)
import hashlib

def test_labels_and_counts_of_every_kind():
    x,y = np.random.rand(40,8,8).astype('float32'),np.arange(40)%4
    assert len(from_arrays(x, y, n_per_class=np.int64(2)).train.dataset)==8
    for labels,kwargs,says in ((np.array(['cat','dog']*20), {}, 'labels must be class numbers'), (np.eye(4)[y], {}, 'labels have shape'),
                               (y-1, {}, 'labels lie between -1'), (y, dict(vocab='abc'), 'expected 0 to 2'), (y, dict(test=(x,y+1)), 'test labels lie')):
        with pytest.raises(ValueError, match=says): from_arrays(x, labels, **kwargs)

def test_loaders_of_fastai_say_how_a_test_set_is_given():
    dls = image_dls('digits')
    with pytest.raises(ValueError, match='hold no test set. Pass `test=\\(x, y\\)` to `from_arrays`, or a third loader'): DataLoaders(dls.train, dls.valid).test
    assert DataLoaders(*dls.loaders).test is dls.test is dls[2]
