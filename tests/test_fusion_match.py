"""The matcher: which modules of a chain become one block."""

from chains import chains, step_sizes

import cnnlstm_fast as cf
from cnnlstm_fast.fusion import match


def test_spans():
    conv, signal, act = match.Part("conv", 4), match.Part("conv", 3), match.Part("activation")
    pool, flatten, norm = match.Part("pool", 4), match.Part("flatten"), match.Part("norm", 4)
    relu, max_pool, drop = match.Part("monotone"), match.Part("max_pool", 4), match.Part("identity")
    assert match.spans([]) == []
    assert match.spans([act, pool, "other"]) == []
    assert match.spans([conv]) == [(0, 1)]
    assert match.spans(["other", conv, act, pool, flatten, act]) == [(1, 5)]
    assert match.spans([conv, pool, act, conv, act, "other", conv]) == [(0, 2), (3, 5), (6, 7)]
    assert match.spans([signal, act, pool]) == [(0, 2)]
    assert match.spans([conv, flatten, pool]) == [(0, 2)]
    assert match.spans([conv, norm, relu, max_pool, flatten, drop]) == [(0, 5)]
    assert match.spans([conv, drop, norm, drop, act, drop, pool, drop]) == [(0, 8)]
    assert match.spans([conv, max_pool, relu, flatten]) == [(0, 4)]
    assert match.spans([conv, relu, max_pool, relu]) == [(0, 3)]
    for chain in ([conv, max_pool, act], [conv, pool, relu], [conv, act, norm], [conv, norm, norm]):
        assert match.spans(chain) == [(0, 2)]


@chains
def test_what_is_fused(chain):
    children, _, expected = chain
    assert step_sizes(cf.Sequential(*children())) == expected
