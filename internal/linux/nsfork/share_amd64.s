#include "textflag.h"

// func cloneVM(args, size uintptr) (pid, errno uintptr)
//
// R12 keeps the return address: its place on the stack is the child's to use by the time the parent goes on.
TEXT ·cloneVM(SB), NOSPLIT|NOFRAME, $0-32
	MOVQ args+0(FP), DI
	MOVQ size+8(FP), SI
	MOVL $435, AX // clone3
	POPQ R12
	SYSCALL
	PUSHQ R12
	CMPQ AX, $0xfffffffffffff001
	JCC  failed
	MOVQ AX, pid+16(FP)
	MOVQ $0, errno+24(FP)
	RET

failed:
	NEGQ AX
	MOVQ $0, pid+16(FP)
	MOVQ AX, errno+24(FP)
	RET
