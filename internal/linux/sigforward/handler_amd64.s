#include "textflag.h"

// handler runs on any thread, as the kernel calls it: the signal in DI, the address to return to on the stack. It must not touch what is
// Go's.
TEXT handler<>(SB), NOSPLIT|NOFRAME, $0
	MOVL DI, SI
	MOVLQSX ·target(SB), DI
	XORL DX, DX
	XORL R10, R10
	MOVL $424, AX // pidfd_send_signal
	SYSCALL
	RET

// back ends a handler.
TEXT back<>(SB), NOSPLIT|NOFRAME, $0
	MOVL $15, AX // rt_sigreturn
	SYSCALL
	INT  $3

// func addresses() (handler, back uintptr)
TEXT ·addresses(SB), NOSPLIT, $0-16
	LEAQ handler<>(SB), AX
	MOVQ AX, handler+0(FP)
	LEAQ back<>(SB), AX
	MOVQ AX, back+8(FP)
	RET
