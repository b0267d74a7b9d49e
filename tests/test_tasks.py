"Networks and tasks as users bring them: what is compared, what goes, what stays, and what is refused."
from types import SimpleNamespace

import pytest
from common import data, flat, here, quiet, state
from fastai.tabular.all import *
from fastai.text.all import *
from kdnb.all import *
from kdnb.distill.inputs import check_codes, input_codes

def answers_of(model, *xb):
    with torch.no_grad(): return model.eval()(*xb)

def pruned_and_shrunken(learn, sparsity=.5):
    "The network with masks, and without what they hold at zero; it trains on"
    quiet(learn, 1, 1e-3, cbs=Pruner(sparsity, by='channel', end=0.))
    masked = deepcopy(learn.model)
    learn.shrink()
    small = deepcopy(learn.model)
    quiet(learn, 1, 1e-3)
    assert np.isfinite(learn.recorder.values[-1][0]) and not torch.equal(flat(learn.model), flat(small))
    assert n_params(small)<n_params(masked) and max_difference(masked, small, learn.dls)<1e-12
    return masked,small

# Photos

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder,rng = tmp_path_factory.mktemp('photos'),np.random.default_rng(0)
    for i in range(48):
        file = folder/'cat dog'.split()[i%2]/f'{i}.png'
        file.parent.mkdir(exist_ok=True)
        Image.fromarray((rng.random((24,24,3))*(128+127*(i%2))).astype(np.uint8)).save(file)
    return folder

def small_body(pretrained=False): return nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def vision(photos, **kwargs):
    dls = ImageDataLoaders.from_folder(photos, valid_pct=.25, seed=0, bs=12, num_workers=0)
    return vision_learner(dls, small_body, pretrained=False, normalize=False, cut=2, lin_ftrs=[16], splitter=default_split, metrics=accuracy, **kwargs)

def test_a_frozen_body_is_pruned_when_it_is_thawed(photos):
    learn,seen = vision(photos),[]
    class Zeros(Callback):
        order = 70
        def after_batch(self):
            if self.training: seen.append((self.opt.frozen_idx, sparsity(self.model)>0))
    quiet(learn, 1, 1e-3, fit='fine_tune', cbs=[Pruner(.5, by='channel'), Zeros()])
    assert {z for i,z in seen if i} == {False} and seen[-1]==(0,True)

def test_a_shrunken_vision_learner_keeps_groups_freezing_and_names(photos, tmp_path):
    learn = vision(photos)
    quiet(learn, 1, 1e-3, fit='fine_tune', cbs=Pruner(.5, by='channel'))
    groups = len(learn.opt.param_lists)
    learn.freeze()
    file = next(iter(get_image_files(photos)))
    with learn.no_bar(): before = learn.predict(file)
    learn.shrink()
    with learn.no_bar(): after = learn.predict(file)
    assert before[0]==after[0] and torch.allclose(before[2], after[2], atol=1e-5)
    assert len(learn.opt.param_lists)==groups and learn.opt.frozen_idx==groups-1
    assert {id(p) for ps in learn.opt.param_lists for p in ps}=={id(p) for p in learn.model.parameters()}
    assert not any(p.requires_grad for p in learn.model[0].parameters() if p.ndim==4) and learn.model[1][-1].weight.requires_grad
    learn.unfreeze()
    body = flat(learn.model[0])
    quiet(learn, 1, slice(1e-4,1e-2), fit='fit_one_cycle')
    assert [h['lr'] for h in learn.opt.hypers][0]<[h['lr'] for h in learn.opt.hypers][-1] and not torch.equal(flat(learn.model[0]), body)
    learn.export(tmp_path/'learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    with again.no_bar(),learn.no_bar(): assert torch.allclose(again.predict(file)[2], learn.predict(file)[2], atol=1e-5)
    made = save_model(learn, tmp_path/'net.safetensors', arch=dict(name='own', kwargs={}))
    assert max_difference(load_model(made, build=lambda: vision(photos).model), learn.model, learn.dls)<1e-12

# Labels and numbers

def flat_net(n_out, seed=0): set_seed(seed); return here(nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, n_out)))

@pytest.mark.parametrize('targets,loss,term', [
    (lambda n: (torch.rand(n,3)>.5).float(), BCEWithLogitsLossFlat(thresh=.3), lambda z,t: F.binary_cross_entropy_with_logits(z, t.sigmoid())),
    (lambda n: torch.rand(n,3), MSELossFlat(), F.mse_loss)], ids=['labels','numbers'])
def test_the_term_follows_the_loss(targets, loss, term):
    dls = DataLoaders(*[DataLoader(list(zip(torch.rand(64,1,8,8), targets(64))), bs=32) for _ in range(2)])
    teacher,learn = flat_net(3, 1),Learner(dls, flat_net(3), loss, opt_func=SGD)
    name = 'binarykd' if isinstance(loss, BCEWithLogitsLossFlat) else 'logitsmse'
    logged = []
    class See(Callback):
        order = -5
        def after_pred(self):
            if self.training: logged.append(term(self.pred.detach(), answers_of(teacher, *self.xb)))
    kd = KnowledgeDistillation(teacher)
    quiet(learn, 1, 0., cbs=[kd, See()])
    assert list(kd.terms)==[name]
    value = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))[name]
    assert value>=0
    if name=='logitsmse': assert value==pytest.approx(float(sum(logged)/len(logged)), rel=1e-3)

# Pixels

def test_a_unet_of_unet_learner_halved():
    rng = np.random.default_rng(0)
    def photo(i): return PILImage.create((rng.random((16,16,3))*255).astype(np.uint8))
    def mask(i): m = (rng.random((16,16))>.5).astype(np.uint8); m[:2] = 255; return PILMask.create(m)
    dls = DataBlock((ImageBlock,MaskBlock(codes=['no','yes'])), get_x=photo, get_y=mask, splitter=RandomSplitter(.5, 0)).dataloaders(range(16), bs=4, num_workers=0)
    def unet(): return unet_learner(dls, small_body, pretrained=False, normalize=False, cut=2, splitter=default_split, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255))
    learn,teacher = unet(),unet()
    quiet(learn, teacher, 1, fit='distill', lr=1e-3)
    masked,small = pruned_and_shrunken(learn)
    assert (small[0][1][0].out_channels, small[4].conv1[0].out_channels)==(8,4)

# What the numbers in inputs stand for

def table(n=60, columns=('a','b','c'), kinds='xyz', scale=1., seed=0):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(a=rng.normal(0, scale, n), b=rng.normal(3, 1, n), c=rng.normal(0, 1, n), kind=[kinds[i%len(kinds)] for i in range(n)], y=[i%2 for i in range(n)]))
    return TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=['kind'], cont_names=list(columns), y_names='y', y_block=CategoryBlock(),
                                      valid_idx=list(range(0, n, 5)), bs=16)

def test_a_table_s_numbers_have_a_meaning():
    dls = table()
    codes = input_codes(dls)
    assert codes['columns']==['kind','a','b','c'] and codes["categories of 'kind'"]==['#na#','x','y','z']
    train = dls.train.dataset
    assert codes["scale of 'b'"]==pytest.approx([float(train.procs.normalize.means['b']), float(train.procs.normalize.stds['b'])])
    learn = tabular_learner(dls, layers=[8], metrics=accuracy)
    for message,other in (("Of the columns, number 1 is 'b' for the teacher, 'a' for the student", table(columns=('b','c','a'))),
                          ("Of the categories of 'kind', number 1 is 'y' for the teacher, 'x' for the student", table(kinds='yz')),
                          ("Of the scale of 'a', mean and deviation are", table(scale=2.))):
        teacher = tabular_learner(other, layers=[16], metrics=accuracy)
        with pytest.raises(ValueError, match=message): quiet(learn, teacher, 1, fit='distill')
        quiet(learn, teacher, 1, fit='distill', teacher_tfm=lambda cat,cont: (cat.clamp(max=2),cont))
    quiet(learn, tabular_learner(table(), layers=[16], metrics=accuracy), 1, fit='distill')

def test_half_of_a_table_s_neurons():
    learn = tabular_learner(table(), layers=[16,8], metrics=accuracy)
    masked,small = pruned_and_shrunken(learn)
    assert [m.out_features for m in small.layers.modules() if isinstance(m, nn.Linear)]==[8,4,2] and small.embeds[0].weight.shape==masked.embeds[0].weight.shape

WORDS = ['xxunk','xxpad','good','great','bad','dull','film']

def texts(words=WORDS):
    g = torch.Generator().manual_seed(0)
    items = [(TensorText(torch.randint(2, 7, (8,), generator=g)),tensor(i%2)) for i in range(32)]
    dls = DataLoaders(*[DataLoader(items, bs=8) for _ in range(2)])
    dls.vocab,dls.c = L(words, CategoryMap(['neg','pos'])),2
    return dls

def test_a_text_classifier():
    dls = texts()
    def awd(dls, emb, hid): return text_classifier_learner(dls, AWD_LSTM, config=awd_lstm_clas_config | dict(emb_sz=emb, n_hid=hid, n_layers=1), pretrained=False, loss_func=CrossEntropyLossFlat(), seq_len=8)
    learn,teacher = awd(dls, 4, 6),awd(dls, 8, 12)
    assert input_codes(dls)=={'tokens': WORDS}
    quiet(learn, teacher, 1, fit='distill', lr=1e-3)
    quiet(learn, 1, 1e-3, cbs=Pruner(.5, layers='all', scope='layer', end=0.))
    zero = {n: float((w==0).float().mean()) for n,w in prunable(learn.model, layers='all').items()}
    assert zero['0.module.rnns.0.weight_hh_l0_raw']==pytest.approx(.5, abs=.02)
    before = answers_of(learn.model, dls.valid.one_batch()[0])[0]
    learn.shrink()
    assert torch.allclose(answers_of(learn.model, dls.valid.one_batch()[0])[0], before, atol=1e-5)
    quiet(learn, 1, 1e-3)
    with pytest.raises(ValueError, match="Of the tokens, number 0 is 'film' for the teacher, 'xxunk' for the student"): quiet(learn, awd(texts(WORDS[::-1]), 8, 12), 1, fit='distill')

def test_codes_of_others_are_not_known():
    for o in (None, data(), SimpleNamespace(vocab=['a','b']), SimpleNamespace(vocab=[CategoryMap(['x','y']), CategoryMap(['u','v'])])): assert input_codes(o)=={}
    check_codes(data(), texts())

# Transformers

def digits(): return image_dls('digits', bs=64)

def test_convnext_and_vit_of_timm_halved():
    from timm.models import ConvNeXt, VisionTransformer
    dls = from_arrays(*[o[:96] for o in (digits().train.dataset.x, digits().train.dataset.y)])
    set_seed(0)
    vit = here(VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=24, depth=2, num_heads=4))
    _,small = pruned_and_shrunken(Learner(dls, vit, metrics=accuracy))
    for b in small.blocks: assert (b.attn.num_heads, b.attn.qkv.out_features, b.mlp.fc1.out_features)==(2,36,48)
    net = here(ConvNeXt(in_chans=1, num_classes=10, depths=(1,1,1,1), dims=(8,8,16,16), patch_size=4, kernel_sizes=3))
    net = nn.Sequential(nn.Upsample(scale_factor=4), net)
    _,small = pruned_and_shrunken(Learner(dls, net, metrics=accuracy))
    assert [s.blocks[0].mlp.fc1.out_features for s in small[1].stages]==[16,16,32,32]

class Named(nn.Module):
    def __init__(self, net, logits=True): super().__init__(); self.net,self.take = net,logits
    def forward(self, x):
        out = self.net(**x) if isinstance(x, dict) else self.net(x)
        return out.logits if self.take else out

def hf_vit(width=24, seed=0):
    t = pytest.importorskip('transformers')
    set_seed(seed)
    return here(t.ViTForImageClassification(t.ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=2*width, num_labels=10, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)))

def hf_bert(width=24, seed=0):
    t = pytest.importorskip('transformers')
    set_seed(seed)
    return here(t.BertForSequenceClassification(t.BertConfig(vocab_size=20, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2*width,
        max_position_embeddings=8, num_labels=2, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)))

def loss_of(out, y): return F.cross_entropy(getattr(out, 'logits', out), y)

@pytest.mark.long
def test_a_vit_of_hugging_face(tmp_path):
    dls = from_arrays(*[o[:96] for o in (digits().train.dataset.x, digits().train.dataset.y)])
    learn = Learner(dls, hf_vit(), loss_of, opt_func=SGD)
    _,small = pruned_and_shrunken(learn)
    for b in small.vit.layers: assert (b.attention.q_proj.out_features, b.attention.o_proj.in_features, b.mlp.fc1.out_features)==(12,12,24)
    made = save_model(small, tmp_path/'vit.safetensors', arch=dict(name='vit', kwargs=dict(width=24)))
    assert max_difference(load_model(made, build=hf_vit), small, dls)<1e-12
    weights = []
    for teacher,logits in ((hf_vit(32, 1), None), (hf_vit(32, 1), 'logits'), (Named(hf_vit(32, 1)), None)):      # objects or tensors
        dls.train.rng = random.Random(0)
        weights.append(flat(quiet(Learner(dls, hf_vit(), loss_of, opt_func=SGD), 1, .1, cbs=KnowledgeDistillation(teacher, KD(T=4), logits=logits)).model))
    assert torch.equal(*weights[:2]) and torch.allclose(*weights[1:], atol=1e-6)
    with pytest.raises(ValueError, match="returns a ImageClassifierOutput with 'logits', and what of it are the logits is not found"):
        quiet(Learner(dls, hf_vit(), loss_of), hf_vit(32, 1), 1, KD(), fit='distill', logits='scores')

def padded(n=32):
    g,res = torch.Generator().manual_seed(0),[]
    for i in range(n):
        ids = torch.randint(1, 20, (8,), generator=g)
        ids[4+i%4:] = 0
        res.append((dict(input_ids=ids, attention_mask=(ids>0).long()),i%2))
    return DataLoaders(DataLoader(res, bs=8, shuffle=True), DataLoader(res, bs=8))

def test_a_bert_of_hugging_face(tmp_path):
    dls = padded()
    learn = Learner(dls, Named(hf_bert()), CrossEntropyLossFlat(), metrics=accuracy, opt_func=SGD)
    _,small = pruned_and_shrunken(learn)
    for b in small.net.bert.encoder.layer: assert (b.attention.self.query.out_features, b.attention.output.dense.in_features, b.intermediate.dense.out_features)==(12,12,24)
    x = inputs(dls, small)[0]
    other = dict(x, input_ids=torch.where(x['attention_mask']>0, x['input_ids'], 7))
    assert torch.allclose(answers_of(small, x), answers_of(small, other), atol=1e-6)
    made = save_model(small, tmp_path/'bert.safetensors', arch=dict(name='bert', kwargs=dict(width=24)))
    assert max_difference(load_model(made, build=lambda width: Named(hf_bert(width))), small, dls)<1e-12

def test_what_stands_in_padding_teaches_nothing():
    "Tokens of the teacher where there is no text are changed, and the student stays the same"
    class Noisy(nn.Module):
        def __init__(self, norm): super().__init__(); self.norm,self.there = norm,None
        def forward(self, x): return torch.where(self.there[...,None], self.norm(x), 100.)
    layer,res = 'net.bert.encoder.layer.1.output.LayerNorm',[]
    for noisy in (False,True):
        dls,teacher = padded(),Named(hf_bert(32, 1))
        dls.train.rng = random.Random(0)
        if noisy:
            norm = Noisy(get_layer(teacher, layer))
            set_layer(teacher, layer, norm)
            teacher.register_forward_pre_hook(lambda m,xb: setattr(norm, 'there', xb[0]['attention_mask']>0))
        learn = Learner(dls, Named(hf_bert(), logits=False), loss_of, opt_func=SGD)
        quiet(learn, 1, .1, cbs=KnowledgeDistillation(teacher, FitNet({layer: layer}), task=0., mask=lambda xb,yb: xb[0]['attention_mask']>0))
        res.append(flat(learn.model.net))
    assert torch.allclose(*res, atol=1e-6) and not torch.allclose(res[0], flat(hf_bert()), atol=1e-4)

def test_a_teacher_whose_inputs_have_names():
    "teacher_tfm may give a dict, of which the teacher is given the entries it asks for"
    dls = data()
    class ByName(nn.Module):
        def __init__(self): super().__init__(); self.net = flat_net(10, 1)
        def forward(self, x): return self.net(x['pixels'])
    learn = Learner(dls, flat_net(10), CrossEntropyLossFlat())
    quiet(learn, ByName().to(default_device()), 1, fit='distill', teacher_tfm=lambda x: dict(pixels=2*x))
    with pytest.raises(ValueError, match='teacher_tfm gives int, expected'): quiet(learn, ByName(), 1, fit='distill', teacher_tfm=lambda x: 3)

# Boxes

class Detector(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, images, targets): return self.net(images, targets if self.training else None)

def body(w=8):
    net = nn.Sequential(ConvLayer(3, w, stride=2), ConvLayer(w, 2*w, stride=2), ConvLayer(2*w, 2*w, stride=2))
    net.out_channels = 2*w
    return net

def faster_rcnn():
    from torchvision.models.detection.faster_rcnn import AnchorGenerator, FasterRCNN, FastRCNNPredictor, MultiScaleRoIAlign, TwoMLPHead
    return FasterRCNN(body(), min_size=32, max_size=32, rpn_anchor_generator=AnchorGenerator(((12,),), ((1.,),)), box_roi_pool=MultiScaleRoIAlign(['0'], 3, 2),
                      box_head=TwoMLPHead(16*9, 32), box_predictor=FastRCNNPredictor(32, 3), rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20)

def levels():
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    return BackboneWithFPN(body(), {'1': '0', '2': '1'}, [16,16], 16)

def retinanet():
    from torchvision.models.detection.retinanet import AnchorGenerator, RetinaNet
    return RetinaNet(levels(), 3, min_size=32, max_size=32, anchor_generator=AnchorGenerator(((8,),(12,),(24,)), ((1.,),)*3))

def ssdlite():
    from torchvision.models.detection.ssd import SSD, DefaultBoxGenerator
    from torchvision.models.detection.ssdlite import SSDLiteHead
    anchors = DefaultBoxGenerator([[2]]*3)
    return SSD(levels(), anchors, (32,32), 3, head=SSDLiteHead([16]*3, anchors.num_anchors_per_location(), 3, nn.BatchNorm2d))

def boxes():
    def item(i):
        x = torch.rand(3, 32, 32)*.2
        x[:,i%16:i%16+12,8:20] += .8
        return x,dict(boxes=torch.tensor([[8., i%16, 20., i%16+12]]), labels=torch.tensor([1+i%2]))
    def batch(items): return [x for x,_ in items],[t for _,t in items],torch.zeros(len(items))
    items = [item(i) for i in range(16)]
    dls = DataLoaders(*[DataLoader(items, bs=4, create_batch=batch) for _ in range(2)])
    dls.n_inp = 2
    return dls

@pytest.mark.parametrize('make,layer', [(faster_rcnn, 'backbone.2'), (retinanet, 'backbone.body.2'), (ssdlite, 'backbone.body.2')])
def test_a_detector_loses_half_of_its_body_and_trains_on(make, layer):
    def learner(seed): set_seed(seed); return Learner(boxes(), here(Detector(make())), lambda out,y: sum(out.values()) if isinstance(out, dict) else torch.zeros(()))
    learn,teacher = learner(0),learner(1)
    quiet(learn, teacher, 1, FitNet({f'net.{layer}': f'net.{layer}'}), fit='distill', lr=1e-3)
    _,small = pruned_and_shrunken(learn)
    assert get_layer(small, f'net.{layer.replace("2", "0")}')[0].out_channels==4
    with pytest.raises(ValueError, match=r'what of it are the logits is not known(.|\n)*compares layers, such as FitNet'): quiet(learn, teacher, 1, fit='distill')
