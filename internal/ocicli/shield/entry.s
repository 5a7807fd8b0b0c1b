//go:build amd64 || arm64

#include "textflag.h"

DATA conexRuntimeExe+0(SB)/8, $"/proc/se"
DATA conexRuntimeExe+8(SB)/8, $"lf/exe\x00\x00"
GLOBL conexRuntimeExe(SB), RODATA|NOPTR, $16

GLOBL conexRuntimeEmpty(SB), RODATA|NOPTR, $8

// struct mount_attr: read-only and without set-user-id bits, private
DATA conexRuntimeAttr+0(SB)/8, $3
DATA conexRuntimeAttr+8(SB)/8, $0
DATA conexRuntimeAttr+16(SB)/8, $0x40000
DATA conexRuntimeAttr+24(SB)/8, $0
GLOBL conexRuntimeAttr(SB), RODATA|NOPTR, $32

DATA conexRuntimeProcs+0(SB)/8, $"GOMAXPRO"
DATA conexRuntimeProcs+8(SB)/8, $"CS=01\x00\x00\x00"
GLOBL conexRuntimeProcs(SB), RODATA|NOPTR, $16
