/* The floor that Snap is measured against: a bare single-producer single-consumer ring of 64-byte slots as a CPython
 * extension. No checks, no states, no sleeping, nothing but two indices: what two Python calls and two cores cost. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>
#include <sys/mman.h>

#define SLOTS 1024u
#define SLOT 64u
#define LINE 64

struct way {
    _Alignas(LINE) _Atomic uint64_t tail;
    _Alignas(LINE) _Atomic uint64_t head;
    _Alignas(LINE) char slots[SLOTS][SLOT];
};

static struct way *out, *in;
static uint64_t tail, head, seen_head, seen_tail;

static PyObject *attach(PyObject *self, PyObject *args) {
    int fd, role;
    if (!PyArg_ParseTuple(args, "ii", &fd, &role)) return NULL;
    struct way *ways = mmap(NULL, 2 * sizeof(struct way), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (ways == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
    out = &ways[role];
    in = &ways[!role];
    tail = head = seen_head = seen_tail = 0;
    Py_RETURN_NONE;
}

static PyObject *size(PyObject *self, PyObject *unused) { return PyLong_FromSize_t(2 * sizeof(struct way)); }

static PyObject *ring_send(PyObject *self, PyObject *data) {
    while (tail - seen_head == SLOTS) seen_head = atomic_load_explicit(&out->head, memory_order_acquire);
    memcpy(out->slots[tail % SLOTS], PyBytes_AS_STRING(data), SLOT);
    atomic_store_explicit(&out->tail, ++tail, memory_order_release);
    Py_RETURN_NONE;
}

static PyObject *ring_recv(PyObject *self, PyObject *unused) {
    for (uint32_t turn = 1; seen_tail == head; turn++) {
        seen_tail = atomic_load_explicit(&in->tail, memory_order_acquire);
        if (turn % (1u << 22) == 0 && PyErr_CheckSignals()) return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(in->slots[head % SLOTS], SLOT);
    atomic_store_explicit(&in->head, ++head, memory_order_release);
    return bytes;
}

static PyMethodDef methods[] = {
    {"attach", attach, METH_VARARGS, "attach(fd, role)"},
    {"size", size, METH_NOARGS, "bytes of shared memory needed"},
    {"send", ring_send, METH_O, "send(64 bytes)"},
    {"recv", ring_recv, METH_NOARGS, "recv() -> 64 bytes"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "bare_ring", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_bare_ring(void) { return PyModule_Create(&module); }
