"""Layers that have the names, attributes and semantics of public ones, written anew.

Each routes in the plain way that its project describes; see `docs/swap.md` for the projects.
Sizes are small, weights large enough for routing that is far from uniform.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

B, L, K, D_IN, D = 5, 6, 3, 4, 5


def scaled(*shape, scale=1.0):
    return nn.Parameter(scale * torch.randn(shape))


def sqrt_eps(s, eps):
    n2 = (s * s).sum(-1, keepdim=True)
    return n2 / (1 + n2) * s / (n2 + eps).sqrt()


def norm_plus_eps(s):
    n = s.norm(dim=-1, keepdim=True)
    return n * n / (1 + n * n) * s / (n + 1e-8)


def no_eps(s):
    n2 = (s * s).sum(-1, keepdim=True)
    return n2 / (1 + n2) * s / n2.sqrt()


def routed(votes, logits, passes, squash, *, axis, detached=True, mask=None):
    """Capsules [B,K,D] of votes [B,K,L,D]; `axis` 1 are the capsules, 2 the inputs."""
    for step in range(passes):
        last = step == passes - 1
        seen = votes.detach() if detached and not last else votes
        coupling = logits.softmax(axis)
        if mask is not None:
            coupling = coupling * mask[:, None]
        capsules = squash((coupling[..., None] * seen).sum(2))
        if not last:
            logits = logits + (capsules[:, :, None] * seen).sum(-1)
    return capsules


# Recommenders


class CapsuleNetwork(nn.Module):
    """The ports of ComiRec: what `tests/test_swap.py` also has from torch-rechub, and a device."""

    def __init__(self, bilinear_type, routing_times=3, relu_layer=False, stop_grad=True):
        super().__init__()
        self.hidden_size, self.seq_len, self.interest_num = D, L, K
        self.bilinear_type, self.routing_times = bilinear_type, routing_times
        self.relu_layer, self.stop_grad = relu_layer, stop_grad
        self.relu = nn.Sequential(nn.Linear(D, D, bias=False), nn.ReLU())
        if bilinear_type < 2:
            self.linear = nn.Linear(D, D * (K if bilinear_type else 1), bias=False)
            nn.init.normal_(self.linear.weight)
        else:
            self.w = scaled(1, L, K * D, D)

    def forward(self, item_eb, mask, device):
        if self.bilinear_type < 2:
            votes = self.linear(item_eb).unflatten(-1, (-1, D)).expand(-1, -1, K, -1)
        else:
            votes = (self.w[0] @ item_eb[..., None]).squeeze(-1).unflatten(-1, (K, D))
        votes = votes.transpose(1, 2)
        make = torch.zeros if self.bilinear_type else torch.randn
        logits = make(len(item_eb), K, L, device=device)
        # The third pass and later ones see the gradient and update nothing.
        passes, first = min(self.routing_times, 3), votes.detach() if self.stop_grad else votes
        for step in range(passes):
            coupling = torch.where(mask[:, None] == 0, 0.0, logits.softmax(-1))
            seen = first if step < 2 else votes
            capsules = sqrt_eps(torch.einsum("bkl,bkld->bkd", coupling, seen), 1e-9)
            logits = logits + torch.einsum("bkd,bkld->bkl", capsules, seen)
        return self.relu(capsules) if self.relu_layer else capsules


class MIMNetCapsules(nn.Module):
    def __init__(self, width=D_IN, iters=3, init_std=1.0):
        super().__init__()
        self.k_max, self.iters, self.init_std = K, iters, init_std
        self.device = torch.get_default_device()
        self.bilinear_mapping_matrix = scaled(width, width)

    def forward(self, behavior_embs, seq_len):
        batch, length, _ = behavior_embs.shape
        votes = behavior_embs @ self.bilinear_mapping_matrix
        logits = torch.normal(0.0, self.init_std, (batch, K, length), device=self.device)
        mask = (torch.arange(length) < seq_len)[:, None]
        for step in range(self.iters):
            seen = votes if step == self.iters - 1 else votes.detach()
            coupling = torch.where(mask, logits, torch.tensor(-1e9)).softmax(1)
            capsules = sqrt_eps(coupling @ seen, 1e-8)
            logits = logits + capsules @ seen.mT
        return capsules


class EasyRecCapsules(nn.Module):
    def __init__(self, const_caps_num=False, max_seq_len=L, scale=2.0):
        super().__init__()
        self._max_seq_len, self._max_k, self._num_iters = max_seq_len, K, 3
        self._routing_logits_scale, self._routing_logits_stddev = scale, 1.0
        self._squash_pow, self._const_caps_num = 0.2, const_caps_num
        self.bilinear_matrix = scaled(D_IN, D)

    def forward(self, inputs, seq_len):
        inputs = inputs[:, : self._max_seq_len]
        missing = inputs.new_zeros(len(inputs), self._max_seq_len - inputs.shape[1], D_IN)
        inputs = torch.cat([inputs, missing], 1)
        mask = (torch.arange(self._max_seq_len) < seq_len[:, None]).float()
        count = torch.full((len(inputs),), float(K))
        if not self._const_caps_num:
            count = torch.log2(seq_len.float()).clamp(1, K)
        present = torch.arange(K) < count[:, None]
        votes = (inputs * mask[..., None]) @ self.bilinear_matrix
        still = votes.detach()
        logits = torch.randn((*inputs.shape[:2], K), dtype=inputs.dtype)
        logits = logits * self._routing_logits_stddev
        for step in range(self._num_iters):
            logits = torch.where(present[:, None], logits, torch.tensor(-1e32))
            coupling = (logits * self._routing_logits_scale).softmax(2) * mask[..., None]
            if step < self._num_iters - 1:
                capsules = coupling.mT @ still
                logits = coupling + F.normalize(still, dim=-1) @ capsules.mT
        capsules = coupling.mT @ votes
        norm = capsules.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        capsules = (norm**2 / (1 + norm**2)) ** self._squash_pow / norm * capsules
        return capsules * present[..., None], present


class KeptLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear_mapping_matrix = scaled(D_IN, D)
        self.routing_logits = nn.Parameter(torch.randn(1, K, L), requires_grad=False)


# Capsule networks


class DenseCapsule(nn.Module):
    def __init__(self, routings=3):
        super().__init__()
        self.in_num_caps, self.in_dim_caps, self.routings = L, D_IN, routings
        self.out_num_caps, self.out_dim_caps = K, D
        self.weight = scaled(K, L, D, D_IN)

    def forward(self, x):
        votes = torch.einsum("klde,ble->bkld", self.weight, x)
        logits = torch.zeros(len(x), K, L)
        return routed(votes, logits, self.routings, norm_plus_eps, axis=1)


class RoutingCapsules(nn.Module):
    def __init__(self, num_routing=3):
        super().__init__()
        self.in_dim, self.in_caps, self.num_caps, self.dim_caps = D_IN, L, K, D
        self.num_routing = num_routing
        self.W = scaled(1, K, L, D, D_IN)

    def forward(self, x):
        votes = torch.einsum("klde,ble->bkld", self.W[0], x)
        return routed(votes, torch.zeros(len(x), K, L), self.num_routing, norm_plus_eps, axis=1)


class GramCapsules(nn.Module):
    def __init__(self, learned=False, num_route_nodes=L):
        super().__init__()
        self.num_route_nodes, self.num_iterations, self.num_capsules = num_route_nodes, 3, K
        if num_route_nodes == -1:
            self.capsules = nn.ModuleList(nn.Conv2d(1, 2, 3) for _ in range(K))
        else:
            self.route_weights = scaled(K, L, D_IN, D)
        if learned:
            self.route_logits = scaled(K, 1, L, 1, 1)

    def forward(self, x):
        if self.num_route_nodes == -1:
            return torch.stack([capsule(x).flatten(1) for capsule in self.capsules], -1)
        votes = torch.einsum("kled,ble->bkld", self.route_weights, x)
        logits = torch.zeros(len(x), K, L)
        if hasattr(self, "route_logits"):
            logits = logits + self.route_logits.flatten(1)
        out = routed(votes, logits, self.num_iterations, no_eps, axis=2, detached=False)
        return out.transpose(0, 1)[:, :, None, None]


class AgreementRouting(nn.Module):
    def __init__(self, n_iterations=3):
        super().__init__()
        self.n_iterations = n_iterations
        self.b = scaled(L, K)

    def forward(self, u_predict):
        logits = self.b.T.expand(len(u_predict), -1, -1)
        votes = u_predict.transpose(1, 2)
        return routed(votes, logits, self.n_iterations + 1, no_eps, axis=1, detached=False)


class CapsLayer(nn.Module):
    def __init__(self, routing_module):
        super().__init__()
        self.input_caps, self.input_dim, self.output_caps, self.output_dim = L, D_IN, K, D
        self.weights = scaled(L, D_IN, K * D)
        self.routing_module = routing_module

    def forward(self, caps_output):
        votes = (caps_output[:, :, None] @ self.weights).squeeze(2).unflatten(-1, (K, D))
        return self.routing_module(votes)


class MeanLogits(nn.Module):
    """Its samples are routed by the mean of their agreements."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self.W = scaled(1, L, K, D, D_IN)

    def forward(self, x):
        votes = torch.einsum("lkde,ble->bkld", self.W[0], x)
        logits = torch.zeros(1, K, L)
        for _ in range(3):
            capsules = no_eps((logits.softmax(2)[..., None] * votes).sum(2))
            logits = logits + (capsules[:, :, None] * votes).sum(-1).mean(0, keepdim=True)
        return capsules


# Bridges


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.uid_embedding, self.iid_embedding = nn.Embedding(9, D), nn.Embedding(30, D)


class Base(nn.Module):
    def __init__(self, out_features):
        super().__init__()
        self.embedding, self.linear = Lookup(), nn.Linear(D, out_features, bias=out_features == D)


def meta_network():
    return nn.Sequential(nn.Linear(D, 7), nn.ReLU(), nn.Linear(7, D * D))


class MetaNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.event_K = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1, bias=False))
        self.event_softmax, self.decoder = nn.Softmax(dim=1), meta_network()

    def forward(self, emb_fea, seq_index):
        score = self.event_K(emb_fea) - (seq_index == 0).float()[..., None] * 1e8
        return self.decoder((self.event_softmax(score) * emb_fea).sum(1))


class MFBasedModel(nn.Module):
    """PTUPCDR on matrix factorisation; ids are user, item, then the history."""

    def __init__(self):
        super().__init__()
        self.src_model, self.tgt_model, self.meta_net = self.base(1), self.base(2), MetaNet()

    def base(self, which):
        return Lookup()

    def tables(self):
        return self.src_model, self.tgt_model

    def source(self, user):
        return user

    def rating(self, user, item):
        return (user * item).sum(1)

    def forward(self, x, stage):
        source, target = self.tables()
        item = target.iid_embedding(x[:, 1])
        if stage == "train_tgt":
            return (target.uid_embedding(x[:, 0]) * item).sum(1)
        # The released code calls forward itself, so hooks of the meta network do not run.
        matrix = self.meta_net.forward(source.iid_embedding(x[:, 2:]), x[:, 2:])
        user = self.source(source.uid_embedding(x[:, 0]))
        return self.rating(torch.bmm(user[:, None], matrix.view(-1, D, D))[:, 0], item)


class _OnBase(MFBasedModel):
    def tables(self):
        return self.src_model.embedding, self.tgt_model.embedding


class GMFBasedModel(_OnBase):
    def base(self, which):
        return Base(1)

    def rating(self, user, item):
        return self.tgt_model.linear(user * item).squeeze(1)


class DNNBasedModel(_OnBase):
    def base(self, which):
        return Base(D)

    def source(self, user):
        return self.src_model.linear(user)


class MIMNetModel(nn.Module):
    """The released MIMNet; ids are user, item, 20 items of the source and 20 of the target."""

    def __init__(self, wo_capsule=0):
        super().__init__()
        self.src_model, self.tgt_model = Lookup(), Lookup()
        self.capsule_bridge = nn.Module()
        self.capsule_bridge.wo_capsule = wo_capsule
        self.capsule_bridge.decoder = meta_network()
        self.capsule_bridge.capsuleLayer = named("CapsuleLayer", MIMNetCapsules)(D)
        for name in ("K", "V", "prot_K", "prot_V"):
            layer = nn.Sequential(nn.Linear(D, D))
            self.add_module(f"capsule_mapping_cross_user_embedd_{name}", layer)
        self.dynamic_fusion = nn.Sequential(nn.Linear(2 * D, 1), nn.Sigmoid())
        self.tgt_iid_cluser_prototypes_embedding = torch.randn(4, D)
        self.tgt_iid_cluser_labels = torch.randint(4, (30,))

    def forward(self, x, stage, tau=0.5):
        item = self.tgt_model.iid_embedding(x[:, 1])
        if stage == "train_tgt":
            return (self.tgt_model.uid_embedding(x[:, 0]) * item).sum(1)
        prototype = self.tgt_iid_cluser_prototypes_embedding[self.tgt_iid_cluser_labels[x[:, 1]]]
        user, history = (
            self.src_model.uid_embedding(x[:, 0]),
            self.src_model.iid_embedding(x[:, 2:22]),
        )
        padded = torch.ones(len(x), 20)
        padded[:, 0] = 0

        def moved(padded):
            lengths = (padded == 0).sum(1, keepdim=True)
            matrices = self.capsule_bridge.decoder(
                self.capsule_bridge.capsuleLayer(history, lengths)
            )
            return (user[:, None, None] @ matrices.view(len(x), -1, D, D)).squeeze(2)

        def attend(query, interests, name):
            key = getattr(self, f"capsule_mapping_cross_user_embedd_{name}K")(interests)
            value = getattr(self, f"capsule_mapping_cross_user_embedd_{name}V")(interests)
            return ((query[:, None] @ key.mT).softmax(-1) @ value)[:, 0]

        interests = moved(padded)
        fine, coarse = attend(item, interests, ""), attend(prototype, interests, "prot_")
        gate = self.dynamic_fusion(torch.cat([item, prototype], -1))
        rating = (((1 - gate) * fine + gate * coarse) * item).sum(1)
        if stage == "test_meta":
            return rating
        dropped = torch.bernoulli(torch.where(padded == 1, 1.0, 0.5))
        return rating, (attend(item, moved(dropped), "") * item).sum(1), 0, 0, 0.0


def named(name, cls):
    """The class under the name that its project gives it; many are called the same."""
    return type(name, (cls,), {})


def history(width=D_IN):
    return torch.randn(B, L, width)


def mask():
    mask = (torch.rand(B, L) > 0.4).long()
    mask[0], mask[1] = 0, 1
    return mask


def lengths():
    return torch.tensor([1, 2, L - 1, L, L])


def ids(columns):
    x = torch.randint(1, 9, (B, 2 + columns))
    x[:, -3:] = 0
    return x


def _case(adapter, make, inputs, **more):
    return SimpleNamespace(adapter=adapter, make=make, inputs=inputs, **more)


def cases():
    """Every adapter on its layers, by name."""
    found = {}
    for kind in (0, 1, 2):
        for options in (
            {}, {"routing_times": 5}, {"routing_times": 2}, {"routing_times": 1},
            {"relu_layer": True, "routing_times": 2}, {"stop_grad": False},
        ):  # fmt: skip
            label = "-".join([f"comirec-{kind}", *(f"{k}={v}" for k, v in options.items())])
            found[label] = _case(
                "comirec",
                lambda kind=kind, options=options: CapsuleNetwork(kind, **options),
                lambda: (history(D), mask(), torch.get_default_device()),
            )
    with_lengths = {
        "mimnet": ("mimnet_capsules", MIMNetCapsules, {}),
        "mimnet-once": ("mimnet_capsules", MIMNetCapsules, {"iters": 1, "init_std": 2.0}),
        "easyrec": ("easyrec", EasyRecCapsules, {}),
        "easyrec-constant": ("easyrec", EasyRecCapsules, {"const_caps_num": True}),
        "easyrec-saturated": ("easyrec", EasyRecCapsules, {"scale": 40.0}),
        "easyrec-longer": ("easyrec", EasyRecCapsules, {"max_seq_len": L + 2}),
        "easyrec-cut": ("easyrec", EasyRecCapsules, {"max_seq_len": L - 2}),
    }
    for label, (adapter, cls, options) in with_lengths.items():
        column = adapter == "mimnet_capsules"
        found[label] = _case(
            adapter,
            lambda cls=cls, options=options: named("CapsuleLayer", cls)(**options),
            lambda column=column: (history(), lengths()[:, None] if column else lengths()),
        )
    on_capsules = {
        "xifengguo": ("dense_capsule", DenseCapsule),
        "danielhavir": ("routing_capsules", RoutingCapsules),
        "danielhavir-copy": ("routing_capsules", named("DigitCaps", RoutingCapsules)),
        "danielhavir-once": ("routing_capsules", lambda: RoutingCapsules(1)),
        "gram": ("gram_capsules", named("CapsuleLayer", GramCapsules)),
        "gram-learned": ("gram_capsules", lambda: named("CapsuleLayer", GramCapsules)(True)),
        "adambielski": ("caps_layer", lambda: CapsLayer(AgreementRouting())),
        "adambielski-once": ("caps_layer", lambda: CapsLayer(AgreementRouting(0))),
    }
    for label, (adapter, make) in on_capsules.items():
        found[label] = _case(adapter, make, lambda: (history(),))
    found["adambielski-votes"] = _case(
        "agreement_routing", AgreementRouting, lambda: (torch.randn(B, L, K, D),)
    )
    for make in (MFBasedModel, GMFBasedModel, DNNBasedModel):
        for stage in ("train_meta", "train_tgt"):
            found[f"ptupcdr-{make.__name__}-{stage}"] = _case(
                "ptupcdr", make, lambda stage=stage: (ids(8), stage)
            )
    for stage in ("train_meta", "test_meta", "train_tgt"):
        found[f"mimnet-model-{stage}"] = _case(
            "mimnet_model", named("MFBasedModel", MIMNetModel), lambda stage=stage: (ids(40), stage)
        )
    return found
