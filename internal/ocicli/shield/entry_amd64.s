#include "textflag.h"

// conexRuntimeEntry is an entry of the program, in the place of Go's own (see the package's comment): Execute before there is a Go
// runtime. It uses no memory but the stack below what the kernel left there. With any error it goes on to Go's entry as if it had
// never been.
//
// R12 is the stack as the kernel left it: the number of arguments, their addresses, a nil, those of the environment, a nil. R13 is
// where the latter begin, R14 their number with the nil. The new environment's address is kept at -48(R12).
TEXT conexRuntimeEntry(SB), NOSPLIT|NOFRAME, $0
	MOVQ SP, R12
	MOVQ (R12), CX
	LEAQ 16(R12)(CX*8), R13
	LEAQ 8(R12), BX

argument: // one of those after the first: "run", "exec" or "create"? All strings together end in eight zeros (execve(2)).
	ADDQ $8, BX
	CMPQ BX, R13
	JAE  go
	MOVQ (BX), DI
	TESTQ DI, DI
	JZ   go
	MOVL (DI), AX
	CMPL AX, $0x006e7572 // "run\0"
	JEQ  wanted
	CMPL AX, $0x63657865 // "exec"
	JEQ  exec
	CMPL AX, $0x61657263 // "crea"
	JNE  argument
	MOVL 4(DI), AX
	ANDL $0xffffff, AX
	CMPL AX, $0x006574 // "te\0"
	JEQ  wanted
	JMP  argument

exec:
	CMPB 4(DI), $0
	JNE  argument

wanted:
	XORL R14, R14
	MOVQ $0x55525f58454e4f43, R8 // "CONEX_RU"
	MOVQ $0x45535f454d49544e, R9 // "NTIME_SE"

variable: // executed again already?
	MOVQ (R13)(R14*8), DI
	INCQ R14
	TESTQ DI, DI
	JZ   view
	CMPQ (DI), R8
	JNE  variable
	CMPQ 8(DI), R9
	JNE  variable
	MOVL 16(DI), AX
	ANDL $0xffffff, AX
	CMPL AX, $0x3d464c // "LF="
	JEQ  go
	JMP  variable

view: // the read-only mount of our own
	MOVL $428, AX // open_tree
	MOVQ $-100, DI
	LEAQ conexRuntimeExe(SB), SI
	MOVL $0x80001, DX // OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC
	SYSCALL
	CMPQ AX, $0xfffffffffffff001
	JCC  go
	MOVQ AX, R15
	MOVL $442, AX // mount_setattr
	MOVQ R15, DI
	LEAQ conexRuntimeEmpty(SB), SI
	MOVL $0x1000, DX // AT_EMPTY_PATH
	LEAQ conexRuntimeAttr(SB), R10
	MOVL $32, R8
	SYSCALL
	TESTQ AX, AX
	JNZ  close
	MOVL $72, AX // fcntl
	MOVQ R15, DI
	XORL SI, SI // F_DUPFD
	MOVL $200, DX // minFD
	SYSCALL
	CMPQ AX, $0xfffffffffffff001
	JCC  close
	MOVQ AX, BX

	// The variable, from its end: a nil, the descriptor's number, the name.
	MOVQ R12, DI
	SUBQ $8, DI
	MOVQ $0, (DI)
	MOVL $10, CX

digit:
	XORL DX, DX
	DIVL CX
	ADDL $48, DX
	DECQ DI
	MOVB DX, (DI)
	TESTL AX, AX
	JNZ  digit
	SUBQ $19, DI
	MOVQ $0x55525f58454e4f43, R8
	MOVQ R8, (DI)
	MOVQ $0x45535f454d49544e, R9
	MOVQ R9, 8(DI)
	MOVB $76, 16(DI) // "L"
	MOVB $70, 17(DI) // "F"
	MOVB $61, 18(DI) // "="

	// The environment again, that first and the number of processors (Procs) last.
	LEAQ 2(R14), CX
	SHLQ $3, CX
	MOVQ R12, R10
	SUBQ CX, R10
	SUBQ $64, R10
	ANDQ $~15, R10
	MOVQ DI, (R10)
	XORL CX, CX

copy:
	MOVQ (R13)(CX*8), AX
	MOVQ AX, 8(R10)(CX*8)
	INCQ CX
	CMPQ CX, R14
	JNE  copy
	LEAQ conexRuntimeProcs(SB), AX
	MOVQ AX, (R10)(R14*8)
	MOVQ $0, 8(R10)(R14*8)

	MOVQ R10, -48(R12)
	MOVL $157, AX // prctl
	MOVL $30, DI // PR_GET_TIMERSLACK
	SYSCALL
	CMPQ AX, $50000 // the kernel's; another one is somebody's wish
	JNE  execute
	MOVL $157, AX // prctl
	MOVL $29, DI // PR_SET_TIMERSLACK
	MOVL $2000000, SI // slack.wider
	SYSCALL

execute:
	MOVL $322, AX // execveat
	MOVQ BX, DI
	LEAQ conexRuntimeEmpty(SB), SI
	LEAQ 8(R12), DX
	MOVQ -48(R12), R10
	MOVL $0x1000, R8 // AT_EMPTY_PATH
	SYSCALL // returns with an error only
	MOVL $157, AX // prctl
	MOVL $30, DI // PR_GET_TIMERSLACK
	SYSCALL
	CMPQ AX, $2000000
	JNE  closeBoth
	MOVL $157, AX // prctl
	MOVL $29, DI // PR_SET_TIMERSLACK
	MOVL $50000, SI
	SYSCALL

closeBoth:
	MOVL $3, AX // close
	MOVQ BX, DI
	SYSCALL

close:
	MOVL $3, AX
	MOVQ R15, DI
	SYSCALL

go:
	MOVQ R12, SP
	XORL DX, DX
	JMP  _rt0_amd64_linux(SB)
