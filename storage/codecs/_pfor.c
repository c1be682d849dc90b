/* The fast twin of pfor_numpy.py, for pfor.py, which says what it is for.

   A row of H values is a record: a byte that says how it is coded, then
     ZERO    nothing: all values are 0
     PACKED  the base, the number of exceptions (2 bytes), H low bytes, 3 runs of E bytes for the codes, the exceptions
     PLAIN   H values of 2 bytes
   with E = ceil(H / 8), all little-endian. Nothing that a record says is believed: one that cannot be is refused. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

enum { ZERO = 0, PACKED = 1, PLAIN = 2 };
enum { HEADER_BYTES = 4, CODES = 8, LARGEST_GAP = 256, MOST_EXCEPTIONS = 65535 };

/* The loops below are written for the compiler to make vectors of. On other systems it may only use what every
   processor of the kind has. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WITH_VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define WITH_VECTORS
#endif

static size_t eighth_of(size_t width) { return (width + CODES - 1) / CODES; }

static uint8_t exponent_of(uint16_t value) { return (uint8_t)(value >> 7); }

/* Return the first of the 8 exponents in a row that most of the values have. */
static uint8_t best_base(const uint16_t *row, size_t width) {
    uint32_t counts[4][256] = {{0}};  /* four, since a count that was just written cannot be read at once */
    for (size_t i = 0; i < width; i++) counts[i % 4][exponent_of(row[i])]++;
    uint32_t within = 0, most = 0;
    int best = 0;
    for (int last = 0; last < 256; last++) {
        for (int k = 0; k < 4; k++) {
            within += counts[k][last];
            if (last >= CODES) within -= counts[k][last - CODES];
        }
        if (last >= CODES - 1 && within > most) {
            most = within;
            best = last - (CODES - 1);
        }
    }
    return (uint8_t)best;
}

/* Write sign and mantissa of each value, and how far its exponent is from the base: above 7 where it is below, too. */
WITH_VECTORS
static void split(const uint16_t *restrict row, size_t width, uint8_t base, uint8_t *restrict low,
                  uint8_t *restrict codes) {
    for (size_t i = 0; i < width; i++) {
        low[i] = (uint8_t)((row[i] >> 8 & 0x80) | (row[i] & 0x7F));
        codes[i] = (uint8_t)((row[i] >> 7) - base);
    }
}

/* Code i of each of the 8 parts of a row goes into byte i of three runs. */
WITH_VECTORS
static void join(const uint8_t *restrict codes, size_t n, uint8_t *restrict out) {
    for (size_t i = 0; i < n; i++) {
        const uint8_t seventh = codes[6 * n + i], eighth = codes[7 * n + i];
        out[i] = (uint8_t)(codes[i] | codes[n + i] << 3 | (seventh & 3) << 6);
        out[n + i] = (uint8_t)(codes[2 * n + i] | codes[3 * n + i] << 3 | (seventh & 4) << 4 | (eighth & 4) << 5);
        out[2 * n + i] = (uint8_t)(codes[4 * n + i] | codes[5 * n + i] << 3 | (eighth & 3) << 6);
    }
}

/* Write the values whose exponent has no code, as pairs of the distance from the one before less 1, and the exponent,
   and set their codes to 0. Return how many pairs there are, or -1 if they do not fit. */
static long write_exceptions(const uint16_t *row, size_t width, uint8_t *codes, uint8_t *out, const uint8_t *end) {
    const uint64_t beyond = UINT64_C(0xF8F8F8F8F8F8F8F8);
    long count = 0;
    size_t next = 0;  /* the first value that no pair has passed */
    for (size_t block = 0; block < width; block += 8) {
        uint64_t eight;
        memcpy(&eight, codes + block, 8);
        if (!(eight & beyond)) continue;
        for (size_t i = block; i < block + 8; i++) {
            if (codes[i] < CODES) continue;
            codes[i] = 0;
            /* A pair of a value that has a code anyway, where it is too far. */
            for (size_t at; next <= i; next = at + 1, count++) {
                at = i - next < LARGEST_GAP ? i : next + LARGEST_GAP - 1;
                if (end - out < 2 || count == MOST_EXCEPTIONS) return -1;
                *out++ = (uint8_t)(at - next);
                *out++ = exponent_of(row[at]);
            }
        }
    }
    return count;
}

static int is_zero(const uint16_t *row, size_t width) {
    for (size_t i = 0; i < width; i++)
        if (row[i]) return 0;
    return 1;
}

/* Write the record of a row, which is at most 1 + 2 * width bytes; `codes` is room for 8 * eighth_of(width), those
   behind the width zero. Return what is behind it. */
static uint8_t *write_record(const uint16_t *row, size_t width, uint8_t *codes, uint8_t *out) {
    const size_t n = eighth_of(width), fixed = HEADER_BYTES + width + 3 * n;
    const uint8_t *end = out + 1 + 2 * width;
    if (is_zero(row, width)) {
        *out = ZERO;
        return out + 1;
    }
    if (fixed <= (size_t)(end - out)) {
        const uint8_t base = best_base(row, width);
        split(row, width, base, out + HEADER_BYTES, codes);
        const long count = write_exceptions(row, width, codes, out + fixed, end);
        if (count >= 0) {
            out[0] = PACKED;
            out[1] = base;
            out[2] = (uint8_t)count;
            out[3] = (uint8_t)(count >> 8);
            join(codes, n, out + HEADER_BYTES + width);
            return out + fixed + 2 * count;
        }
    }
    *out++ = PLAIN;
    for (size_t i = 0; i < width; i++) {
        *out++ = (uint8_t)row[i];
        *out++ = (uint8_t)(row[i] >> 8);
    }
    return out;
}

#define RESTORE(part, code_of)                                                                                 \
    {                                                                                                          \
        const size_t from = (part) * n < width ? (part) * n : width;                                           \
        const size_t here = width - from < n ? width - from : n;                                               \
        const uint8_t *restrict low_here = low + from;                                                         \
        uint16_t *restrict out_here = out + from;                                                              \
        for (size_t i = 0; i < here; i++) {                                                                    \
            const uint8_t exponent = (uint8_t)(base + (code_of));                                              \
            out_here[i] = (uint16_t)((low_here[i] & 0x80) << 8 | exponent << 7 | (low_here[i] & 0x7F));        \
        }                                                                                                      \
    }

/* Restore the values of a row, of which the exceptions are wrong yet. */
WITH_VECTORS
static void restore(const uint8_t *restrict low, const uint8_t *restrict first, size_t width, uint8_t base,
                    uint16_t *restrict out) {
    const size_t n = eighth_of(width);
    const uint8_t *restrict second = first + n;
    const uint8_t *restrict third = second + n;
    RESTORE(0, first[i] & 7)
    RESTORE(1, first[i] >> 3 & 7)
    RESTORE(2, second[i] & 7)
    RESTORE(3, second[i] >> 3 & 7)
    RESTORE(4, third[i] & 7)
    RESTORE(5, third[i] >> 3 & 7)
    RESTORE(6, first[i] >> 6 | (second[i] >> 4 & 4))
    RESTORE(7, third[i] >> 6 | (second[i] >> 5 & 4))
}

/* Return the size of the record at `at`, or 0 if it is none or ends behind `end`. */
static size_t record_bytes(const uint8_t *at, const uint8_t *end, size_t width) {
    const size_t left = (size_t)(end - at);
    size_t size = 0;
    if (left && at[0] == ZERO) size = 1;
    if (left && at[0] == PLAIN) size = 1 + 2 * width;
    if (left >= HEADER_BYTES && at[0] == PACKED && at[1] <= 256 - CODES)
        size = HEADER_BYTES + width + 3 * eighth_of(width) + 2 * (size_t)(at[2] | at[3] << 8);
    return size <= left ? size : 0;
}

/* Restore a row from a record that is whole; return whether its exceptions are within the row. */
static int read_record(const uint8_t *at, size_t width, uint16_t *out) {
    if (at[0] == ZERO) {
        memset(out, 0, 2 * width);
        return 1;
    }
    if (at[0] == PLAIN) {
        for (size_t i = 0; i < width; i++) out[i] = (uint16_t)(at[1 + 2 * i] | at[2 + 2 * i] << 8);
        return 1;
    }
    const uint8_t *low = at + HEADER_BYTES, *pair = low + width + 3 * eighth_of(width);
    restore(low, low + width, width, at[1], out);
    size_t next = 0;
    for (int left = at[2] | at[3] << 8; left; left--, pair += 2) {
        next += pair[0];
        if (next >= width) return 0;
        out[next] = (uint16_t)((out[next] & 0x807F) | pair[1] << 7);
        next++;
    }
    return 1;
}

/* Take rows (R, H) of 2 bytes whose values lie side by side; return 0 with an exception set if it is none of that. */
static int take_rows(PyObject *object, int flags, Py_buffer *rows) {
    if (PyObject_GetBuffer(object, rows, flags | PyBUF_STRIDES) < 0) return 0;
    if (rows->ndim == 2 && rows->itemsize == 2 && (rows->strides[1] == 2 || rows->shape[1] <= 1) &&
        rows->strides[0] % 2 == 0 && (uintptr_t)rows->buf % 2 == 0)
        return 1;
    PyErr_SetString(PyExc_ValueError, "rows are not (R, H) of 2 bytes, with the values of a row side by side");
    PyBuffer_Release(rows);
    return 0;
}

static PyObject *pack(PyObject *module, PyObject *arguments) {
    PyObject *of_rows, *of_room;
    Py_buffer rows, room;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OO", &of_rows, &of_room)) return NULL;
    if (!take_rows(of_rows, 0, &rows)) return NULL;
    if (PyObject_GetBuffer(of_room, &room, PyBUF_SIMPLE | PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&rows);
        return NULL;
    }
    PyObject *result = NULL;
    const size_t width = (size_t)rows.shape[1];
    uint8_t *codes = PyMem_Calloc(eighth_of(width) + 1, CODES);
    if (!codes) {
        PyErr_NoMemory();
    } else if ((size_t)room.len < (size_t)rows.shape[0] * (1 + 2 * width)) {
        PyErr_SetString(PyExc_ValueError, "too little room for what rows may become");
    } else {
        uint8_t *end = room.buf;
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t r = 0; r < rows.shape[0]; r++)
            end = write_record((const uint16_t *)((const char *)rows.buf + r * rows.strides[0]), width, codes, end);
        Py_END_ALLOW_THREADS
        result = PyLong_FromSsize_t(end - (uint8_t *)room.buf);
    }
    PyMem_Free(codes);
    PyBuffer_Release(&room);
    PyBuffer_Release(&rows);
    return result;
}

static PyObject *unpack(PyObject *module, PyObject *arguments) {
    PyObject *of_stored, *of_rows;
    Py_buffer stored, rows;
    Py_ssize_t skipped, row = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OnO", &of_stored, &skipped, &of_rows)) return NULL;
    if (PyObject_GetBuffer(of_stored, &stored, PyBUF_SIMPLE) < 0) return NULL;
    if (!take_rows(of_rows, PyBUF_WRITABLE, &rows)) {
        PyBuffer_Release(&stored);
        return NULL;
    }
    const size_t width = (size_t)rows.shape[1];
    const Py_ssize_t stop = skipped + rows.shape[0];
    const uint8_t *at = stored.buf, *first = at, *end = at + stored.len;
    Py_BEGIN_ALLOW_THREADS
    for (; row < stop; row++) {
        const size_t size = record_bytes(at, end, width);
        if (!size) break;
        if (row >= skipped) {
            char *out = (char *)rows.buf + (row - skipped) * rows.strides[0];
            if (!read_record(at, width, (uint16_t *)out)) break;
        }
        at += size;
        if (row < skipped) first = at;
    }
    Py_END_ALLOW_THREADS
    PyObject *result = NULL;
    if (row < stop)
        PyErr_Format(PyExc_ValueError, "row %zd is no record of %zd values", row, rows.shape[1]);
    else
        result = Py_BuildValue("nn", (Py_ssize_t)(first - (const uint8_t *)stored.buf),
                               (Py_ssize_t)(at - (const uint8_t *)stored.buf));
    PyBuffer_Release(&rows);
    PyBuffer_Release(&stored);
    return result;
}

static PyMethodDef METHODS[] = {
    {"pack", pack, METH_VARARGS, "pack(rows, room): fill room with the records of rows (R, H); return their bytes."},
    {"unpack", unpack, METH_VARARGS,
     "unpack(stored, skipped, out): fill out (T, H) with the rows behind the skipped ones; return where their records "
     "begin and end."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_pfor", NULL, 0, METHODS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__pfor(void) { return PyModule_Create(&MODULE); }
