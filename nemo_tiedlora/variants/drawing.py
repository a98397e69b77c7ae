"""How random adapter tensors are drawn: rule 2, which gives the same bits on every machine.

Frozen factors are not saved but drawn again, so their bits must depend on nothing but the seed, the tensor's key and
its shape. Here they do:

- the random bits are integers: the published counter-based generator Philox4x64-10 (Salmon et al., 2011), as numpy
  has it; numpy guarantees the stream of a bit generator, and none of its distributions is used;
- they become numbers by the float64 operations that IEEE 754 rounds correctly (+, −, ×, ÷, √, and scaling by powers of
  two), element by element, one numpy call each, so that no compiler joins two of them into a fused one. No function of
  a mathematical library, whose last bits are its own, and no sum, whose order would be the processor's;
- the result is rounded to float32 once.

So it depends on no version of torch, on no CPU and on no number of threads. Whatever changes a bit here is another rule
and needs another number: files of this one must stay readable.
"""

import hashlib
import math

import numpy

#: The number of this rule, which adapter files record.
RULE = 2
#: Elements at a time, so that they stay in the processor's cache; of no effect on the values.
BLOCK = 2**13
#: ln 2, rounded.
LN2 = 0.6931471805599453
#: 1/(2k + 1) for k = 11 … 0: atanh(s)/s as a polynomial in s²; the rest is below 1e-18 for |s| < 0.172.
ATANH = [1 / (2 * k + 1) for k in range(11, -1, -1)]
#: Numerators and denominators of the inverse normal distribution, highest power first: Wichura's algorithm AS 241
#: (PPND16; Applied Statistics 37, 1988), exact to about 1e-16 of the value; near the middle, in the tails, far out.
MIDDLE = (
    [2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0],
    [5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0],
)  # fmt: skip
TAIL = (
    [7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0],
    [1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0],
)  # fmt: skip
FAR = (
    [2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0],
    [2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0],
)  # fmt: skip

Array = numpy.ndarray


def normal(shape: tuple[int, ...], std: float, seed: int, key: str) -> Array:
    """Independent normal float32 values of mean 0, of the tensor called ``key``; |value| < 8.3 · ``std``."""
    return _draw(shape, std, seed, key, standard_normal)


def uniform(shape: tuple[int, ...], bound: float, seed: int, key: str) -> Array:
    """Independent float32 values, uniform between −``bound`` and ``bound``."""
    return _draw(shape, bound, seed, key, lambda centred: centred * 2)


def integers(shape: tuple[int, ...], below: int, seed: int, key: str) -> Array:
    """Independent int32 values from 0 to ``below`` − 1 (at most 2**31), all as likely as 2**32 parts allow."""
    words = _bits(seed, key).random_raw(math.prod(shape))
    words >>= numpy.uint64(32)
    words *= numpy.uint64(below)
    words >>= numpy.uint64(32)
    return words.astype(numpy.int32).reshape(shape)


def _draw(shape: tuple[int, ...], scale: float, seed: int, key: str, distribution) -> Array:
    bits = _bits(seed, key)
    values = numpy.empty(math.prod(shape), numpy.float32)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        block[:] = distribution(_centred(bits.random_raw(len(block)))) * scale
    return values.reshape(shape)


def _bits(seed: int, key: str) -> numpy.random.Philox:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return numpy.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=0)


def _centred(words: Array) -> Array:
    """The middle of one of 2**52 equal parts of (−½, ½), by the upper bits of each 64-bit word; all steps are exact."""
    parts = (words >> numpy.uint64(12)).view(numpy.int64)
    parts -= 2**51
    values = parts.astype(numpy.float64)
    values += 0.5
    values *= 2.0**-52
    return values


def standard_normal(centred: Array) -> Array:
    """The inverse of the normal distribution at ½ + ``centred``, for float64 values in (−½, ½)."""
    square = numpy.square(centred)
    values = _ratio(MIDDLE, numpy.subtract(0.180625, square, out=square))
    values *= centred
    outside = numpy.flatnonzero(numpy.abs(centred) > 0.425)
    side = centred[outside]
    root = numpy.sqrt(minus_log(0.5 - numpy.abs(side)))
    tails = _ratio(TAIL, root - 1.6)
    far = numpy.flatnonzero(root > 5)
    tails[far] = _ratio(FAR, root[far] - 5)
    values[outside] = numpy.copysign(tails, side)
    return values


def minus_log(x: Array) -> Array:
    """−ln x of positive float64 values: −2 atanh((m − 1)/(m + 1)) − e ln 2 for x = m · 2**e, m within √½ … √2."""
    m, e = numpy.frexp(x)
    small = m < 0.7071067811865476
    m = numpy.where(small, m * 2, m)
    s = (m - 1) / (m + 1)
    logarithm = _polynomial(ATANH, s * s)
    logarithm *= s
    logarithm *= 2
    return -(logarithm + (e - small) * LN2)


def _ratio(of: tuple[list[float], list[float]], x: Array) -> Array:
    numerator, denominator = of
    values = _polynomial(numerator, x)
    values /= _polynomial(denominator, x)
    return values


def _polynomial(coefficients: list[float], x: Array) -> Array:
    """By Horner's rule, highest power first."""
    values = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        values += coefficient
        values *= x
    values += coefficients[-1]
    return values
