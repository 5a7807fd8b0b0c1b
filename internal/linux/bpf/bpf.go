// Package bpf owns bpf(2): small eBPF programs, written down as instructions, are loaded and attached with it.
package bpf

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Instruction is struct bpf_insn.
type Instruction struct {
	Code uint8
	Regs uint8 // destination, and source in the upper half
	Off  int16
	Imm  int32
}

// Op returns an instruction.
func Op(code, regs uint8, off int16, imm int32) Instruction {
	return Instruction{Code: code, Regs: regs, Off: off, Imm: imm}
}

// The codes of instructions that golang.org/x/sys does not have as one.
const (
	LoadWord                   = unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W // dst = *(u32 *)(src + Off)
	StoreWord                  = unix.BPF_ST | unix.BPF_MEM | unix.BPF_W  // *(u32 *)(dst + Off) = Imm
	Load64                     = unix.BPF_LD | unix.BPF_IMM | dw          // dst = two instructions' Imm
	MoveReg                    = alu64 | mov | unix.BPF_X                 // dst = src
	Move                       = alu64 | mov | unix.BPF_K                 // dst = Imm
	Add                        = alu64 | unix.BPF_ADD | unix.BPF_K        // dst += Imm
	And                        = alu64 | unix.BPF_AND | unix.BPF_K        // dst &= Imm
	ShiftDown                  = alu64 | unix.BPF_RSH | unix.BPF_K        // dst >>= Imm
	IfEqual                    = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K // to Off if dst == Imm
	IfNot                      = unix.BPF_JMP | jne | unix.BPF_K          // to Off if dst != Imm, which is extended with its sign
	IfNot32                    = jmp32 | jne | unix.BPF_K                 // to Off if dst's lower half != Imm
	Call                       = unix.BPF_JMP | 0x80                      // r0 = the kernel's function Imm
	Exit                       = unix.BPF_JMP | 0x90                      // the verdict is in r0
	alu64, dw, mov, jne, jmp32 = 0x07, 0x18, 0xb0, 0x50, 0x06
)

// FromMap as the source register of Load64 says that the number is a map's descriptor.
const FromMap = unix.BPF_PSEUDO_MAP_FD << 4

// The members of union bpf_attr for the commands, as linux/bpf.h lays them out for machines with 64-bit pointers.
type (
	attrLoad struct {
		progType, insnCount uint32
		insns, license      unsafe.Pointer
		logLevel, logSize   uint32
		logBuf              unsafe.Pointer
		kernVersion, flags  uint32
		name                [16]byte
		_, attachType       uint32
	}
	attrMap    struct{ mapType, keySize, valueSize, maxEntries uint32 }
	attrUpdate struct {
		fd, _      uint32
		key, value unsafe.Pointer
		flags      uint64
	}
	attrLink   struct{ prog, target, attachType, flags uint32 }
	attrAttach struct{ target, prog, attachType, flags uint32 }
	attrQuery  struct {
		target, attachType, queryFlags, attachFlags uint32
		ids                                         unsafe.Pointer
		count, _                                    uint32
	}
)

// Load hands a program to the kernel, which verifies it, and returns its descriptor. kind is one of unix.BPF_PROG_TYPE_*, place the one of
// unix.BPF_* that the program will be attached at.
func Load(kind, place uint32, name string, prog []Instruction) (int, error) {
	license := [...]byte{'A', 'p', 'a', 'c', 'h', 'e', 0}
	a := attrLoad{progType: kind, insnCount: uint32(len(prog)), insns: unsafe.Pointer(&prog[0]), license: unsafe.Pointer(&license[0]), attachType: place}
	copy(a.name[:len(a.name)-1], name)
	fd, err := call(unix.BPF_PROG_LOAD, unsafe.Pointer(&a), unsafe.Sizeof(a))
	if err != nil {
		return -1, fmt.Errorf("load BPF program: %w", err)
	}
	return fd, nil
}

// Sockets makes a map of sockets, and returns its descriptor. Key k of it is the k-th; the map holds none of them open.
func Sockets(fds ...int) (int, error) {
	a := attrMap{mapType: unix.BPF_MAP_TYPE_SOCKMAP, keySize: 4, valueSize: 8, maxEntries: uint32(len(fds))}
	m, err := call(unix.BPF_MAP_CREATE, unsafe.Pointer(&a), unsafe.Sizeof(a))
	if err != nil {
		return -1, fmt.Errorf("make BPF map of sockets: %w", err)
	}
	for k, fd := range fds {
		key, value := uint32(k), uint64(fd)
		u := attrUpdate{fd: uint32(m), key: unsafe.Pointer(&key), value: unsafe.Pointer(&value)}
		if _, err := call(unix.BPF_MAP_UPDATE_ELEM, unsafe.Pointer(&u), unsafe.Sizeof(u)); err != nil {
			unix.Close(m)
			return -1, fmt.Errorf("put socket into BPF map: %w", err)
		}
	}
	return m, nil
}

// Link attaches a program to what target is a descriptor of. It stays as long as the descriptor that is returned is open. kind is the
// place, one of unix.BPF_*.
func Link(prog, target int, kind uint32) (int, error) {
	a := attrLink{prog: uint32(prog), target: uint32(target), attachType: kind}
	fd, err := call(unix.BPF_LINK_CREATE, unsafe.Pointer(&a), unsafe.Sizeof(a))
	if err != nil {
		return -1, fmt.Errorf("attach BPF program: %w", err)
	}
	return fd, nil
}

// Attach adds a program to those that a cgroup has at a place.
func Attach(cgroup, prog int, kind uint32) error {
	a := attrAttach{target: uint32(cgroup), prog: uint32(prog), attachType: kind, flags: unix.BPF_F_ALLOW_MULTI}
	_, err := call(unix.BPF_PROG_ATTACH, unsafe.Pointer(&a), unsafe.Sizeof(a))
	return err
}

// Detach takes a program off a cgroup by its id. One that is gone is no error.
func Detach(cgroup int, id, kind uint32) error {
	fd, err := call(unix.BPF_PROG_GET_FD_BY_ID, unsafe.Pointer(&struct{ id, next, flags uint32 }{id: id}), 12)
	if err == nil {
		a := attrAttach{target: uint32(cgroup), prog: uint32(fd), attachType: kind}
		_, err = call(unix.BPF_PROG_DETACH, unsafe.Pointer(&a), unsafe.Sizeof(a))
		unix.Close(fd)
	}
	if err == unix.ENOENT {
		return nil // somebody else was faster
	}
	return err
}

// Attached lists the ids of the programs that are attached to the cgroup itself at a place.
func Attached(cgroup int, kind uint32) ([]uint32, error) {
	var ids [64]uint32 // the kernel's limit for one cgroup
	a := attrQuery{target: uint32(cgroup), attachType: kind, ids: unsafe.Pointer(&ids[0]), count: uint32(len(ids))}
	if _, err := call(unix.BPF_PROG_QUERY, unsafe.Pointer(&a), unsafe.Sizeof(a)); err != nil {
		return nil, err
	}
	return ids[:a.count:a.count], nil
}

// call is bpf(2).
func call(cmd int, attr unsafe.Pointer, size uintptr) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR, unix.EAGAIN: // the verifier gives way to signals
		default:
			return -1, errno
		}
	}
}
