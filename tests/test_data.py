"Image sets: what is read is what is there, splits are fixed, and missing or corrupt files are named."
import gzip, hashlib, io, os, pickle, queue, shutil, tarfile, time, zipfile
from multiprocessing import get_context

import pytest
from fastai.vision.all import *
from kdnb.data import readers as data, sets
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

def _jpeg_archive(path):
    "Six images of two classes in the layout of cifar10-jpeg.tar.xz"
    names = sorted(sets._cifar_names)
    with tarfile.open(path/'cifar10-jpeg.tar.xz', 'w:xz') as t:
        for split,y in (('train', [3,1,1,3]), ('test', [1,3])):
            for c in (1,3):
                for k in range(sum(o==c for o in y)):
                    f = io.BytesIO()
                    PILImage.create(np.full((32,32,3), 50*c+10*k+100*(split=='test'), np.uint8)).save(f, 'jpeg')
                    info = tarfile.TarInfo(f'cifar10-jpeg/{split}/{names[c]}/{k:04}.jpg')
                    info.size = f.tell()
                    f.seek(0)
                    t.addfile(info, f)
    np.savez(path/'cifar10-labels-original-order.npz', train=np.array([1,0,0,1], np.uint8), test=np.array([0,1], np.uint8))
    files = [o for o in path.iterdir() if o.is_file()]
    (path/'MD5SUMS').write_text(''.join(f'{hashlib.md5(f.read_bytes()).hexdigest()}  ./{f.name}\n' for f in files))
    return path

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path/'cache'/'kdnb'

def test_cifar10_jpeg(tmp_path, cache, monkeypatch):
    "The order of the original set; decoded once, and again where the cache is no longer what was written"
    decode,n = data._decode_jpegs,[]
    monkeypatch.setattr(data, '_decode_jpegs', lambda src: n.append(src) or decode(src))
    _jpeg_archive(tmp_path)
    def read():
        x,y,xt,yt = data._cifar10_jpeg(tmp_path)
        assert y.tolist()==[1,0,0,1] and yt.tolist()==[0,1] and x.shape==(4,3,32,32)
        assert x[:,0,0,0].tolist()==[150,50,60,160] and xt[:,0,0,0].tolist()==[150,250]     # the k-th of a class is the k-th of that label
        return x
    assert isinstance(read(), np.memmap) and isinstance(read(), np.memmap) and len(n)==1
    f, = cache.glob('*.npy')
    good = f.read_bytes()
    for i,bad in enumerate((good[:-1]+b'x', good[:-1], good[:50], b''), 2):
        f.write_bytes(bad)
        read()
        assert len(n)==i and f.read_bytes()==good and len([*cache.iterdir()])==2     # and the lock
    (tmp_path/'cifar10-labels-original-order.npz').write_bytes(b'x')
    with pytest.raises(ValueError, match='original-order.npz is corrupt'): data._cifar10_jpeg(tmp_path)

def test_processes_started_at_once_decode_once(tmp_path, cache, monkeypatch):
    _jpeg_archive(tmp_path)
    decode,fork = data._decode_jpegs,get_context('fork')
    decoded,sums,start = fork.Queue(),fork.Queue(),fork.Barrier(3)
    def slowly(src):
        decoded.put(os.getpid())
        time.sleep(1)
        return decode(src)
    def read():
        start.wait(60)
        sums.put(int(data._cifar10_jpeg(tmp_path)[0].sum()))
    monkeypatch.setattr(data, '_decode_jpegs', slowly)
    ps = [fork.Process(target=read) for _ in range(3)]
    for p in ps: p.start()
    for p in ps: p.join(100)
    assert [p.exitcode for p in ps]==[0]*3 and len({sums.get(timeout=9) for _ in ps})==1
    decoded.get(timeout=9)
    with pytest.raises(queue.Empty): decoded.get(timeout=.5)

@pytest.mark.long
@pytest.mark.mnist
def test_the_exact_images_are_those_of_the_test_set(data_dir):
    dls = image_dls('cifar10_jpeg', n_per_class=10)
    exact,jpeg = exact_test(dls)
    assert len(exact.dataset)==len(jpeg.dataset)==1017 and torch.equal(jpeg.dataset.x, dls.test.dataset.x[:1017])
    assert torch.equal(exact.dataset.y, dls.test.dataset.y[:1017]) and torch.equal(exact.dataset.y, jpeg.dataset.y)
    a,b = exact.dataset.x.float(),jpeg.dataset.x.float()
    assert 0<(a-b).abs().mean()<10 and ((a-b.roll(1, 0))**2).mean((1,2,3)).lt(((a-b)**2).mean((1,2,3))).sum()==0
    assert not exact.shuffle and not exact.augments and exact.one_batch()[0].shape==jpeg.one_batch()[0].shape==(64,3,32,32)
    half = exact_test(image_dls('cifar10_jpeg', n_per_class=10, size=16))[0].dataset.x
    assert torch.equal(half, F.avg_pool2d(a, 2).round().byte())
    with pytest.raises(ValueError, match="Pass the loaders of image_dls\\('cifar10_jpeg'\\)"): exact_test(image_dls('mnist'))

def test_cifar100(tmp_path, monkeypatch):
    "Small pickles in its format, with torchvision's checksums replaced by theirs"
    from torchvision.datasets import CIFAR100
    root = tmp_path/CIFAR100.base_folder
    root.mkdir()
    rng,names = np.random.default_rng(0),[f'class {i}' for i in range(4)]
    x = {k: rng.integers(0, 256, (n,3,32,32), np.uint8) for k,n in (('train',40), ('test',8))}
    for k in x: (root/k).write_bytes(pickle.dumps(dict(data=x[k].reshape(len(x[k]),-1), fine_labels=[i%4 for i in range(len(x[k]))])))
    (root/'meta').write_bytes(pickle.dumps(dict(fine_label_names=names)))
    def md5(f): return hashlib.md5((root/f).read_bytes()).hexdigest()
    for k in x: monkeypatch.setattr(CIFAR100, f'{k}_list', [[k, md5(k)]])
    monkeypatch.setattr(CIFAR100, 'meta', CIFAR100.meta | dict(md5=md5('meta')))
    dls = image_dls('cifar100', path=tmp_path)
    assert list(dls.vocab)==names and dls.c==4 and [len(o.dataset) for o in dls.loaders]==[36,4,8]
    assert np.array_equal(dls.test.dataset.x, x['test']) and dls.test.dataset.y.tolist()==[0,1,2,3]*2
    assert data_table(tmp_path).state['cifar100']=='checksums right'
    def nothing(self): raise OSError('no network')
    monkeypatch.setattr(CIFAR100, 'download', nothing)
    with pytest.raises(FileNotFoundError, match='CIFAR100 is not in .*no network.*put cifar-100-python.tar.gz there'):
        image_dls('cifar100', path=tmp_path/'nowhere')

def test_tiny_imagenet(tmp_path, cache, monkeypatch):
    "A small archive in its format: the official validation images are the test set, grey ones become colour"
    def jpeg(v, mode='RGB'):
        f = io.BytesIO()
        PILImage.create(np.full((64,64,3), v, np.uint8)).convert(mode).save(f, 'jpeg')
        return f.getvalue()
    f,root = tmp_path/'tiny-imagenet-200.zip','tiny-imagenet-200'
    with zipfile.ZipFile(f, 'w') as z:
        z.writestr(f'{root}/wnids.txt', 'n02\nn01\n')
        z.writestr(f'{root}/words.txt', 'n00\tno class\nn01\tgoldfish, Carassius auratus\nn02\tcrane\n')
        for c in (1,2):
            z.writestr(f'{root}/train/n0{c}/n0{c}_boxes.txt', '')
            for k in range(10): z.writestr(f'{root}/train/n0{c}/images/n0{c}_{k}.JPEG', jpeg(100*c+k, 'L' if k==3 else 'RGB'))
        z.writestr(f'{root}/val/val_annotations.txt', 'val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n')
        for k in range(2): z.writestr(f'{root}/val/images/val_{k}.JPEG', jpeg(10*k))
        z.writestr(f'{root}/test/images/test_0.JPEG', jpeg(0))
    with pytest.raises(ValueError, match='tiny-imagenet-200.zip is corrupt'): image_dls('tiny_imagenet', path=tmp_path)
    monkeypatch.setitem(data._tiny_imagenet_zip, 'md5', hashlib.md5(f.read_bytes()).hexdigest())
    dls = image_dls('tiny_imagenet', path=tmp_path)
    assert list(dls.vocab)==['goldfish (n01)','crane (n02)'] and [len(o.dataset) for o in dls.loaders]==[18,2,2] and dls.in_shape==(3,64,64)
    assert dls.test.dataset.y.tolist()==[1,0] and dls.test.dataset.x[:,0,0,0].tolist()==[0,10]
    x,y = dls.train.dataset.x,dls.train.dataset.y
    assert torch.equal(x[:,0,0,0]//100-1, y) and (x[:,0]==x[:,2]).float().mean()>.99
    assert dls.train.after_batch[1].mean.flatten().tolist()==pytest.approx(imagenet_stats[0])
    assert data_table(tmp_path).state['tiny_imagenet']=='checksums right'
    def nothing(*args): raise OSError('no network')
    monkeypatch.setattr('torchvision.datasets.utils.download_url', nothing)
    with pytest.raises(FileNotFoundError, match='tiny-imagenet-200 is not in .*no network.*or put tiny-imagenet-200.zip .MD5'):
        image_dls('tiny_imagenet', path=tmp_path/'nowhere')

def test_tiny_where_there_is_no_gpu_or_where_asked_for(monkeypatch):
    for env,cuda,small in ((None,True,False), ('1',True,True), ('0',True,False), (None,False,True), ('0',False,True)):
        if env: monkeypatch.setenv('KDNB_TINY', env)
        else: monkeypatch.delenv('KDNB_TINY', raising=False)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
        assert tiny()==small

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

def test_an_export_carries_no_images(tmp_path):
    dls = from_arrays(torch.zeros(2000,1,28,28, dtype=torch.uint8), torch.arange(2000)%10)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(784,10)), path=tmp_path)
    learn.export('small.pkl')
    assert (tmp_path/'small.pkl').stat().st_size<200_000
    assert load_learner(tmp_path/'small.pkl').dls.train.dataset.x.shape==(0,1,28,28)
