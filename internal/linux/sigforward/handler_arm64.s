#include "textflag.h"

// handler runs on any thread, as the kernel calls it: the signal in R0, the address to return to, the kernel's own, in R30. It must not
// touch what is Go's.
TEXT handler<>(SB), NOSPLIT|NOFRAME, $0
	MOVW R0, R1
	MOVW ·target(SB), R0
	MOVD $0, R2
	MOVD $0, R3
	MOVD $424, R8 // pidfd_send_signal
	SVC
	RET

// func addresses() (handler, back uintptr)
TEXT ·addresses(SB), NOSPLIT, $0-16
	MOVD $handler<>(SB), R0
	MOVD R0, handler+0(FP)
	MOVD ZR, back+8(FP)
	RET
