# kivi. Two commands: `make run` and `make test`. `make help` lists the rest.
# BUILD=dir and SAN=address|undefined|thread give separate, instrumented trees; CC=clang works too.
SHELL := /bin/bash
.DEFAULT_GOAL := all

PREFIX ?= /usr/local
BUILD ?= build
VERSION := $(shell sed -n 's/^\#define KIVI_VERSION "\(.*\)"/\1/p' include/kivi.h)
SAN ?=
DEBUG ?= 0

WARN := -Wall -Wextra -Wshadow -Wconversion -Wsign-conversion -Wstrict-prototypes -Wmissing-prototypes -Werror
# -ffp-contract=off and no fast-math anywhere: the same bytes on every machine (DESIGN.md 6).
CFLAGS_BASE := -std=c17 -D_GNU_SOURCE -O2 -g -fPIC -fvisibility=hidden -ffp-contract=off -pthread -MMD -MP
ifneq ($(SAN),)
CFLAGS_BASE += -fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=all -DKI_DEBUG=1
LDFLAGS += -fsanitize=$(SAN)
else ifeq ($(DEBUG),1)
CFLAGS_BASE += -DKI_DEBUG=1
else
CFLAGS_BASE += -DNDEBUG
endif
INC := -Iinclude -Isrc/base -Isrc/device -Isrc/kernel -Isrc/cache -Isrc/load -Isrc/token -Isrc/model \
       -Isrc/engine -Isrc/serve -Isrc/cuda
PKGS := jansson libpcre2-8 libutf8proc
PKG_CFLAGS = $(shell pkg-config --cflags $(PKGS))
PKG_LIBS = $(shell pkg-config --libs $(PKGS))
LIBS = $(PKG_LIBS) -lm
# The command's own: editing of lines (chat), HTTP (serve). The library needs neither.
PROG_PKGS := libedit libmicrohttpd
PROG_LIBS = $(shell pkg-config --libs $(PROG_PKGS))

# Instruction sets of the machine the compiler compiles for; no file of another's is compiled.
TARGET := $(shell $(CC) -dumpmachine 2>/dev/null)
ISAS := scalar $(if $(filter x86_64-%,$(TARGET)),avx2 avx512 avx512vnni) \
        $(if $(filter aarch64-% arm64-%,$(TARGET)),neon neondot)
OTHER_ISAS := $(filter-out $(ISAS:%=src/kernel/isa_%.c),$(wildcard src/kernel/isa_*.c))

# The library, and the part of it that needs no library at all (kernels and cache: build/check-kernels).
# What needs CUDA's headers is in a library of its own.
CUDA_C := $(addprefix src/cuda/,backend.c exchange.c forward.c gemm.c memory.c pass.c sdpa.c sdpa_graph.c sizes.c \
            start.c weights.c)
LIB_SRC := $(filter-out $(OTHER_ISAS) $(CUDA_C),$(wildcard src/*/*.c))
CORE_SRC := $(filter-out $(OTHER_ISAS),$(wildcard src/base/*.c src/device/*.c src/kernel/*.c src/cache/*.c)) \
            src/cuda/kv_layout.c src/cuda/kv_prompt_plan.c src/cuda/kv_shared.c
PROG_SRC := $(wildcard programs/*.c programs/serve/*.c)
LIB_OBJ := $(LIB_SRC:%.c=$(BUILD)/%.o)
CORE_OBJ := $(CORE_SRC:%.c=$(BUILD)/%.o)
PROG_OBJ := $(PROG_SRC:%.c=$(BUILD)/%.o)
CHECK_SRC := $(wildcard tests/check/*.c)
CHECK_OBJ := $(CHECK_SRC:%.c=$(BUILD)/%.o)
TEST_SRC := $(wildcard tests/test_*.c)
TEST_BIN := $(TEST_SRC:tests/%.c=$(BUILD)/%)

# Sixteen inlined lanes under a sanitizer at -O3 keep the compiler busy for minutes.
KERNEL_OPT := $(if $(SAN),-O1,-O3)
# Flags of an instruction set stand on single files only; everything else is the baseline of x86-64 or aarch64.
AVX2 := -mavx2 -mfma -mf16c $(KERNEL_OPT)
$(BUILD)/src/kernel/isa_avx2.o: ISA := $(AVX2)
# GCC 12 aligns the fake stacks of detect_stack_use_after_return to less than the 64 bytes its code relies on.
AVX512_SAN := $(if $(findstring address,$(SAN)),$(if $(findstring clang,$(CC)),,--param asan-use-after-return=0))
AVX512 := -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c $(KERNEL_OPT) -mprefer-vector-width=512 $(AVX512_SAN)
$(BUILD)/src/kernel/isa_avx512.o: ISA := $(AVX512)
AVX512VNNI := $(AVX512) -mavx512vnni
$(BUILD)/src/kernel/isa_avx512vnni.o: ISA := $(AVX512VNNI)
# Every aarch64 has NEON. GCC's dot product intrinsics want Armv8.2; src/device/cpu.c asks for what that brings.
$(BUILD)/src/kernel/isa_neon.o: ISA := $(KERNEL_OPT)
$(BUILD)/src/kernel/isa_neondot.o: ISA := $(KERNEL_OPT) -march=armv8.2-a+dotprod
# The definition, not the fast way: at -O3 it takes the compiler four minutes.
$(BUILD)/src/kernel/isa_scalar.o: ISA := -O1

.PHONY: all run test test-gpu emulated lint install man uninstall clean help bench fuzz deps pareto aarch64-syntax FORCE
all: $(BUILD)/kivi $(BUILD)/libkivi.a $(BUILD)/libkivi.so $(BUILD)/check-kernels $(BUILD)/kivi.pc

$(BUILD)/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(CFLAGS_BASE) $(WARN) $(INC) $(PKG_CFLAGS) $(ISA) $(CFLAGS) -c $< -o $@

$(BUILD)/libkivi.a: $(LIB_OBJ)
	@rm -f $@
	$(AR) rcs $@ $^
$(BUILD)/libkivi.so: $(LIB_OBJ)
	$(CC) -shared -Wl,-soname,libkivi.so.0 -Wl,--no-undefined $(LDFLAGS) $^ -o $@ $(LIBS) -pthread
$(BUILD)/kivi: $(PROG_OBJ) $(BUILD)/libkivi.a
	$(CC) $(LDFLAGS) $^ -o $@ $(PROG_LIBS) $(LIBS) -pthread
$(BUILD)/programs/serve/page.o: programs/serve/page.html
# One static program without libraries, to be carried to any machine of its kind.
$(BUILD)/check-kernels: $(CHECK_OBJ) $(CORE_OBJ)
	$(CC) $(if $(SAN),,-static) $(LDFLAGS) $^ -o $@ -lm -pthread
# The same for aarch64, by Debian's cross compiler; runs under qemu-aarch64 (tests/aarch64.py).
CROSS_AARCH64 ?= aarch64-linux-gnu-
$(BUILD)/aarch64/check-kernels: FORCE
	@$(MAKE) --no-print-directory BUILD=$(BUILD)/aarch64 CC=$(CROSS_AARCH64)gcc PKG_CFLAGS= PKG_LIBS= $@
# All other sources as far as a compiler gets without that machine's libraries: their headers are the same everywhere.
aarch64-syntax:
	$(CROSS_AARCH64)gcc $(filter-out -MMD -MP,$(CFLAGS_BASE)) $(WARN) $(INC) $(PKG_CFLAGS) -idirafter /usr/include \
	    -fsyntax-only $(filter-out src/kernel/isa_%,$(LIB_SRC)) $(PROG_SRC)
$(BUILD)/test_%: $(BUILD)/tests/test_%.o $(BUILD)/libkivi.a
	$(CC) $(LDFLAGS) $^ -o $@ -lcmocka $(LIBS) -pthread
# Not a test itself: the rows of a GGUF file as the kernels see them, for tests/py_gguf_rows.py.
$(BUILD)/gguf_rows: $(BUILD)/tests/gguf_rows.o $(BUILD)/libkivi.a
	$(CC) $(LDFLAGS) $^ -o $@ $(LIBS) -pthread
# The engine on a GPU through kivi.h, for `make test-gpu`: no library but the engine's own.
$(BUILD)/gpu_engine: $(BUILD)/tests/gpu/check_engine.o $(BUILD)/libkivi.a
	$(CC) $(LDFLAGS) $^ -o $@ $(LIBS) -pthread
$(BUILD)/kivi.pc: tools/kivi.pc.in Makefile include/kivi.h FORCE
	@mkdir -p $(@D)
	@sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@VERSION@|$(VERSION)|' -e 's|@PKGS@|$(PKGS)|' $< > $@

# ---- CUDA: where nvcc is ----
# sm_80 and sm_90a are what the kernels are written for (cp.async and mma.sync; bulk copies on sm_90).
NVCC ?= $(firstword $(wildcard $(shell command -v nvcc) /usr/local/cuda/bin/nvcc))
CUDA_ARCHS ?= 80 90a
CUDA_SRC := $(wildcard src/cuda/*.cu)
CUDA_OBJ := $(CUDA_SRC:%.cu=$(BUILD)/%.cu.o)
# The kernels of the cache take minutes: only their own headers count for them.
KV_HEADERS := $(filter-out $(addprefix %/kv_,append.h append.cuh bench.h bench.cuh prompt.h quant.cuh), \
              $(wildcard src/cuda/kv_*.h src/cuda/kv_*.cuh)) \
              src/cuda/pdl.cuh src/cuda/ptx.cuh include/kivi.h include/kivi_cache.h
CUDA_HEADERS := $(wildcard src/cuda/*.h src/cuda/*.cuh tests/cuda/*.cuh) include/*.h src/load/load.h
NVCC_FLAGS := -std=c++17 -O3 -lineinfo -Werror all-warnings -Xcompiler -fPIC,-Wall,-fvisibility=hidden \
              $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) $(INC)
KV_EXACT := $(wildcard src/cuda/kv_append*.cu) src/cuda/kv_prompt_append.cu
$(KV_EXACT:%=$(BUILD)/%.o): src/cuda/kv_append.h src/cuda/kv_append.cuh src/cuda/kv_quant.cuh
$(addprefix $(BUILD)/src/cuda/kv_,prompt.cu.o unpack.cu.o bench.cu.o): src/cuda/kv_prompt.h
$(BUILD)/src/cuda/kv_bench.cu.o: src/cuda/kv_append.h src/cuda/kv_bench.h src/cuda/kv_bench.cuh include/kivi_bench.h
$(BUILD)/src/cuda/kv_%.cu.o: src/cuda/kv_%.cu $(KV_HEADERS)
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) $(if $(filter $(KV_EXACT),$<),-fmad=false) -c $< -o $@
$(BUILD)/%.cu.o: %.cu $(CUDA_HEADERS) $(KV_HEADERS)
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) -c $< -o $@
# The backend: its own objects, the little of libkivi.a that it calls, CUDA's runtime inside; cuBLASLt alone is
# loaded with it. Its one symbol is ki_backend_library.
CUDA_HOME ?= $(patsubst %/bin/,%,$(dir $(realpath $(NVCC))))
CUDA_C_OBJ := $(CUDA_C:%.c=$(BUILD)/%.o)
# cuDNN's headers, where they are: beside CUDA's or the system's. Its library is looked for at run time.
SDPA_OBJ := $(BUILD)/src/cuda/sdpa.o $(BUILD)/src/cuda/sdpa_graph.o
$(CUDA_C_OBJ): PKG_CFLAGS += -isystem $(CUDA_HOME)/include
$(BUILD)/libkivi-cuda.so: $(CUDA_C_OBJ) $(CUDA_OBJ) $(BUILD)/libkivi.a
	$(CC) -shared -Wl,--no-undefined -Wl,--exclude-libs,ALL $(LDFLAGS) $^ -o $@ -L$(CUDA_HOME)/lib64 \
	    -lcudart_static -lcublasLt -lstdc++ -lm -ldl -lrt -pthread
$(BUILD)/libkivi-cuda-kernels.a: $(CUDA_OBJ) $(SDPA_OBJ)
	@rm -f $@
	$(AR) rcs $@ $^
# Tests and measurements on a device: the project's own objects and the CUDA runtime inside, nothing else to carry.
$(BUILD)/check-cuda: $(BUILD)/tests/cuda/check_cuda.cu.o $(CORE_OBJ) $(CUDA_OBJ) $(SDPA_OBJ)
	$(NVCC) -cudart static $^ -o $@ -lpthread -lm -ldl
# The same beside the cache: tokens drawn against engine/draw.c, products of few rows.
DENSE_OBJ := $(patsubst %,$(BUILD)/src/%.o,cuda/draw.cu cuda/dense.cu cuda/stream.cu cuda/stream_wide.cu \
               cuda/gemm engine/draw)
$(BUILD)/check-dense: $(BUILD)/tests/cuda/check_dense.cu.o $(DENSE_OBJ) $(CORE_OBJ)
	$(NVCC) -cudart static $^ -o $@ -L$(CUDA_HOME)/lib64 -lcublasLt -lpthread -lm
$(BUILD)/tune-cuda: $(BUILD)/tests/cuda/tune_cuda.cu.o $(CORE_OBJ) $(CUDA_OBJ) $(SDPA_OBJ)
	$(NVCC) -cudart static $^ -o $@ -lpthread -lm -ldl
# cuDNN's plans without a device (tests/py_sdpa.py): the driver in their way is one of our own.
$(BUILD)/check-sdpa: $(BUILD)/tests/cuda/check_sdpa.o $(SDPA_OBJ) $(BUILD)/src/base/base.o
	$(CC) $(LDFLAGS) $^ -o $@ -ldl -pthread
$(BUILD)/fake-driver/libcuda.so.1: tests/cuda/fake_driver.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS_BASE) $(WARN) $(LDFLAGS) -shared -Wl,-soname,libcuda.so.1 $< -o $@
$(BUILD)/fake-driver/libcuda.so.1: CFLAGS_BASE := -std=c17 -O2 -fPIC
ifneq ($(NVCC),)
all: $(addprefix $(BUILD)/,libkivi-cuda.so libkivi-cuda-kernels.a check-cuda check-dense)
all: $(BUILD)/check-sdpa $(BUILD)/fake-driver/libcuda.so.1
endif

# ---- CUDA without a GPU: kernels compiled as C++ for an emulator (tests/cuda/emulator) ----
# No toolkit is needed, only a C++ compiler. Objects of KI_EMULATED=800 carry other names, for both are in one program.
EMULATED_FLAGS = -std=gnu++17 -O2 -g -ffp-contract=off -fno-strict-aliasing -fno-extern-tls-init -MMD -MP \
                 -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-enum-compare -Wno-unused-parameter $(INC) \
                 -Itests/cuda -Itests/cuda/emulator/cuda -include emulator/cuda.cuh
EMULATED_SRC := $(wildcard src/cuda/kv_decode*.cu)
EMULATED_OBJ := $(EMULATED_SRC:src/cuda/%.cu=$(BUILD)/emulated/%.o) \
                $(patsubst %,$(BUILD)/emulated/kv_decode_%_sm80.o,64 128) \
                $(patsubst tests/cuda/emulator/%.cpp,$(BUILD)/emulated/%.o,$(wildcard tests/cuda/emulator/*.cpp))
$(BUILD)/emulated/%_sm80.o: src/cuda/%.cu Makefile
	@mkdir -p $(@D)
	$(CXX) $(EMULATED_FLAGS) -DKI_EMULATED=800 $(foreach n,decode_shape warp_pipe ki_decode_table_64 \
	    ki_decode_table_128,-D$(n)=$(n)_sm80) -x c++ -c $< -o $@
$(BUILD)/emulated/%.o: src/cuda/%.cu Makefile
	@mkdir -p $(@D)
	$(CXX) $(EMULATED_FLAGS) -DKI_EMULATED=900 -x c++ -c $< -o $@
$(BUILD)/emulated/%.o: tests/cuda/emulator/%.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(EMULATED_FLAGS) -DKI_EMULATED=900 -c $< -o $@
$(BUILD)/check-emulated: $(EMULATED_OBJ) $(CORE_OBJ)
	$(CXX) $(LDFLAGS) $^ -o $@ -lm -pthread

# A change of compiler or flags rebuilds everything; those of single files are among them.
FLAGS_LINE = $(CC) $(CFLAGS_BASE) $(WARN) $(CFLAGS) | $(KERNEL_OPT) | $(AVX2) | $(AVX512) | $(AVX512VNNI)
$(BUILD)/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(FLAGS_LINE)' | cmp -s - $@ || echo '$(FLAGS_LINE)' > $@

run: ; @tools/run.sh
test: ; @tools/test.sh
test-gpu: all $(BUILD)/gpu_engine ; @KIVI_BUILD=$(BUILD) python3 tests/run.py --stage gpu
lint: ; @python3 tools/lint.py
deps: ; @tools/deps.sh build
# Twenty minutes and more: measures every kind, builds llama-cpp-python once. python3-matplotlib is the system's python.
pareto: $(BUILD)/kivi
	@tools/deps.sh model plots
	@KIVI_BIN=$(abspath $(BUILD))/kivi /usr/bin/python3 tools/pareto.py $(PARETO)

# From the option table, by scdoc.
man: $(BUILD)/man/kivi.1
$(BUILD)/man/kivi.1: $(BUILD)/kivi
	@scdoc -v > /dev/null || { echo 'kivi: error: man pages need scdoc: tools/deps.sh build' >&2; exit 2; }
	@rm -rf $(@D) && mkdir -p $(@D)
	set -o pipefail; for c in $$($< --completion names); do $< --man $$c | scdoc > $(@D)/kivi-$$c.1 || exit 1; done
	set -o pipefail; $< --man | scdoc > $@

MAN := $(PREFIX)/share/man/man1
COMPLETIONS := bash-completion/completions zsh/site-functions fish/vendor_completions.d
install: all man
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/lib/pkgconfig
	install -m 755 $(BUILD)/kivi $(DESTDIR)$(PREFIX)/bin/kivi
	install -m 644 include/kivi.h include/kivi_cache.h include/kivi_text.h $(DESTDIR)$(PREFIX)/include/
	install -m 644 include/kivi_convert.h include/kivi_serve.h include/kivi_bench.h $(DESTDIR)$(PREFIX)/include/
	install -m 644 $(BUILD)/libkivi.a $(DESTDIR)$(PREFIX)/lib/
	install -m 755 $(BUILD)/libkivi.so $(DESTDIR)$(PREFIX)/lib/libkivi.so.$(VERSION)
	ln -sf libkivi.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/libkivi.so.0
	ln -sf libkivi.so.0 $(DESTDIR)$(PREFIX)/lib/libkivi.so
	install -m 644 $(BUILD)/kivi.pc $(DESTDIR)$(PREFIX)/lib/pkgconfig/
	install -d $(DESTDIR)$(PREFIX)/libexec/kivi
	install -m 755 tools/fetch_model.sh $(DESTDIR)$(PREFIX)/libexec/kivi/
	install -d $(DESTDIR)$(MAN) $(COMPLETIONS:%=$(DESTDIR)$(PREFIX)/share/%)
	install -m 644 $(BUILD)/man/*.1 $(DESTDIR)$(MAN)/
	$(BUILD)/kivi --completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/kivi
	$(BUILD)/kivi --completion zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_kivi
	$(BUILD)/kivi --completion fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/kivi.fish
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/kivi $(DESTDIR)$(PREFIX)/include/kivi{,_cache,_text,_convert,_serve,_bench}.h
	rm -f $(DESTDIR)$(PREFIX)/lib/libkivi.{a,so,so.0,so.$(VERSION)} $(DESTDIR)$(PREFIX)/lib/pkgconfig/kivi.pc
	rm -rf $(DESTDIR)$(PREFIX)/libexec/kivi
	rm -f $(DESTDIR)$(MAN)/kivi.1 $(DESTDIR)$(MAN)/kivi-*.1
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/share/,$(join $(COMPLETIONS),/kivi /_kivi /kivi.fish))
clean: ; rm -rf $(BUILD)
help:
	@echo 'make run      install what is missing, build, fetch the small model, generate'
	@echo 'make test     everything; one closing line'
	@echo 'make emulated decode kernels of CUDA for the CPU: build/check-emulated, part of make test'
	@echo 'make test-gpu what needs an NVIDIA GPU; one closing line'
	@echo 'make          build only            make lint   style rules'
	@echo 'make install  DESTDIR= PREFIX=      make deps   Debian packages for building'
	@echo 'make pareto   the picture of bits against divergence in docs/, measured anew'

tests: $(TEST_BIN) $(BUILD)/gguf_rows
emulated: $(BUILD)/check-emulated
-include $(LIB_OBJ:.o=.d) $(CUDA_C_OBJ:.o=.d) $(PROG_OBJ:.o=.d) $(CHECK_OBJ:.o=.d) \
         $(TEST_SRC:%.c=$(BUILD)/%.d) $(BUILD)/tests/gpu/check_engine.d $(BUILD)/tests/gguf_rows.d \
         $(BUILD)/tests/cuda/check_sdpa.d $(EMULATED_OBJ:.o=.d)
