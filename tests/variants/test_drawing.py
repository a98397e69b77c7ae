"""The drawing rule: the bits it promises, its distributions, and what is recorded of a frozen tensor."""

import hashlib
import math

import numpy
import pytest
import torch
from scipy import special, stats

from nemo_tiedlora import console
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import Init, checksum, config_for, drawing, drawing_by_torch
from nemo_tiedlora.variants.frozen import check, record

#: Draws that adapter files in the world depend on: these digests never change.
DIGESTS = {
    ("normal", (8, 2048), 1, "attention_qkv.A"): "0c136ebf8d5375617fc5a6258548e94737441b02aa9b310ee931211426010ae5",
    (
        "kaiming_uniform",
        (300, 7),
        1234,
        "mlp_fc1.B",
    ): "0195405fd89427ea298bb5e5b1ec45b92402196caff2b323f7b745ae49ad6063",
    ("kaiming_normal", (3, 5), 0, "x"): "e484e23ae56ba499ceee83c68515b2fb0ca02e43d85f5b8fa91b5ad417ed133a",
    ("xavier", (12288, 8), 1234, "attention_qkv.B"): "d1349c1c04a8ed28b97d5718ed8e625edcc0ccf3e9037a26055246e81dd6b109",
}
#: Of the first of them as earlier versions drew it.
TORCH_FINGERPRINT = "0.0220971 -0.31265 0.41474 1.63868"
SAMPLES = 1_000_000


@pytest.mark.parametrize("draw", DIGESTS, ids=lambda draw: draw[0])
def test_the_bits_are_the_pinned_ones(draw):
    kind, shape, seed, key = draw
    drawn = Init(kind).draw(shape, seed, key)
    assert drawn.shape == shape and drawn.dtype == torch.float32
    assert checksum(drawn) == DIGESTS[draw]


def philox(key: int, blocks: int) -> list[int]:
    """Philox4x64-10 as its paper writes it (Salmon et al., 2011, figure 2): four words for each counter from 1 on."""
    mask, words = 2**64 - 1, []
    for block in range(1, blocks + 1):
        counter, keys = [block, 0, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
            counter = [
                (second >> 64) ^ counter[1] ^ keys[0],
                second & mask,
                (first >> 64) ^ counter[3] ^ keys[1],
                first & mask,
            ]
            keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
        words += counter
    return words


def polynomial(coefficients, x):
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient  # Python rounds each operation, as IEEE 754 says
    return value


def scalar_normal(centred: float) -> float:
    """The rule for one number, in Python's own arithmetic."""
    if abs(centred) <= 0.425:
        square = 0.180625 - centred * centred
        return polynomial(drawing.MIDDLE[0], square) / polynomial(drawing.MIDDLE[1], square) * centred
    m, e = math.frexp(0.5 - abs(centred))
    if m < 0.7071067811865476:
        m, e = m * 2, e - 1
    s = (m - 1) / (m + 1)
    root = math.sqrt(-(polynomial(drawing.ATANH, s * s) * s * 2 + e * drawing.LN2))
    of, x = (drawing.TAIL, root - 1.6) if root <= 5 else (drawing.FAR, root - 5)
    return math.copysign(polynomial(of[0], x) / polynomial(of[1], x), centred)


def test_every_bit_follows_from_philox_and_correctly_rounded_arithmetic():
    key = int.from_bytes(hashlib.sha256(b"7:q.A").digest()[:16], "little")
    centred = [((word >> 12) - 2**51 + 0.5) * 2.0**-52 for word in philox(key, 5000)]
    shape = (4, 5000)
    normal = numpy.array([scalar_normal(x) * 0.3 for x in centred], numpy.float32).reshape(shape)
    uniform = numpy.array([x * 2 * 0.3 for x in centred], numpy.float32).reshape(shape)
    assert numpy.array_equal(drawing.normal(shape, 0.3, 7, "q.A"), normal)
    assert numpy.array_equal(drawing.uniform(shape, 0.3, 7, "q.A"), uniform)


def test_a_draw_depends_on_seed_and_key():
    draws = [Init("normal").draw((8, 64), seed, key) for seed in (0, 1) for key in ("q.A", "q.B")]
    assert len({checksum(draw) for draw in draws}) == 4
    assert torch.equal(draws[0], Init("normal").draw((8, 64), 0, "q.A"))


def test_the_inverse_normal_distribution_is_exact_far_into_the_tails():
    probability = numpy.concatenate([numpy.arange(1, 2**17) * 2.0**-18, 2.0 ** -numpy.arange(2, 54.0)])
    found, expected = drawing.standard_normal(probability - 0.5), special.ndtri(probability)
    numpy.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)
    numpy.testing.assert_array_equal(drawing.standard_normal(0.5 - probability), -found)
    numpy.testing.assert_allclose(drawing.minus_log(probability), -numpy.log(probability), rtol=1e-15)


def test_normal_draws_are_normal():
    drawn = drawing.normal((1000, SAMPLES // 1000), 1.0, 3, "a").ravel().astype(float)
    assert stats.kstest(drawn, "norm").pvalue > 0.01
    for power, moment in {1: 0, 2: 1, 3: 0, 4: 3, 6: 15}.items():
        error = math.sqrt(special.factorial2(4 * (power // 2) + 2 * (power % 2) - 1) / SAMPLES)
        assert abs((drawn**power).mean() - moment) < 5 * error, power
    for tail in (0.1, 0.01, 1e-3, 1e-4):
        for beyond in (drawn < special.ndtri(tail), drawn > -special.ndtri(tail)):
            assert abs(beyond.sum() - tail * SAMPLES) < 4 * math.sqrt(tail * SAMPLES), tail
    assert 4.2 < abs(drawn).max() < 6
    for lag in (1, 2, 3, 4, 1000):
        assert abs((drawn[lag:] * drawn[:-lag]).mean()) < 4 / math.sqrt(SAMPLES), lag


def test_uniform_draws_are_uniform():
    drawn = drawing.uniform((1000, SAMPLES // 1000), 2.0, 3, "a").ravel().astype(float)
    assert stats.kstest(drawn, stats.uniform(-2, 4).cdf).pvalue > 0.01
    assert abs(drawn.mean()) < 5 * 2 / math.sqrt(3 * SAMPLES) and abs(drawn).max() <= 2


def test_the_rule_of_earlier_versions_draws_what_they_drew():
    drawn = Init("normal").draw((8, 2048), 1, "attention_qkv.A", rule=1)
    unit = Init("normal").unit((8, 2048))
    check("A", drawn, unit, f"{'0' * 64} {TORCH_FINGERPRINT}", 1, 1)  # not by checksum: the last bits are the CPU's
    assert drawing_by_torch.holds(1e-5)


def test_a_torch_that_draws_otherwise_is_noticed(monkeypatch):
    recorded = record(Init("normal").draw((8, 64), 1, "q.A", 1), 1 / 8)[:64]
    monkeypatch.setattr(drawing_by_torch, "_generator", lambda seed, key: torch.Generator().manual_seed(5))
    with pytest.raises(UsageError, match="not the one this adapter was trained against"):
        check("q.A", Init("normal").draw((8, 64), 1, "q.A", 1), 1 / 8, recorded, 1, 1)


@pytest.fixture
def notes(capsys):
    """What was said on standard error."""
    console.note.cache_clear()
    return lambda: capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("rule", [1, 2])
def test_other_last_bits_are_accepted_with_one_line_and_other_values_refused(notes, rule):
    init, shape = Init("normal"), (8, 512)
    unit, drawn = init.unit(shape), init.draw(shape, 1, "q.A", rule)
    recorded = record(drawn, unit)
    assert len(recorded) < 110
    check("q.A", drawn, unit, recorded, rule, 1)
    assert len(notes()) == (rule == 1)
    console.note.cache_clear()
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5
    for key in ("q.A", "k.A"):
        check(key, drawn + 4e-6 * unit * noise, unit, recorded, rule, 1)
    (line,) = notes()
    assert line.startswith("note: ") and "1e-05" in line
    for other in (drawn + 1e-4 * unit, -drawn, drawn * 1.0001, init.draw(shape, 2, "q.A", rule), drawn.flip(1)):
        with pytest.raises(UsageError, match=r"seed=1: the frozen q\.A drawn from it by rule \d is not the one"):
            check("q.A", other, unit, recorded, rule, 1)
    assert not notes()


def test_which_rule_an_adapter_is_of():
    """Checksums without a rule were recorded before there were rules."""
    draw = Init("normal").draw((8, 64), 1, "q.A")
    recorded = {"q.A": record(draw, 1 / 8)}
    assert config_for("vera", {}).drawing_rule == 2
    assert config_for("vera", {"checksums": {"q.A": "0" * 64}}).drawing_rule == 1
    assert config_for("vera", {"checksums": recorded, "drawing_rule": 2}).drawing_rule == 2
    assert config_for("vera", {"drawing_rule": 1}).drawing_rule == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"drawing_rule": 3},
        {"drawing_rule": "2"},
        {"drawing_rule": [2]},
        {"checksums": ["0" * 64]},
        {"checksums": {"q.A": 7}},
        {"checksums": {"q.A": "0" * 63}},
        {"checksums": {"q.A": "0" * 64 + " 1.00000 nan 0.00000 0.00000"}},
        {"checksums": {"q.A": "0" * 64 + " 1.00000"}},
    ],
    ids=str,
)
def test_a_bad_record_is_named(settings):
    with pytest.raises(UsageError, match="^(drawing_rule|checksums)=") as error:
        config_for("vera", settings)
    assert "\n" not in str(error.value)
