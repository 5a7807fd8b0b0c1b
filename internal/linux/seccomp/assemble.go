package seccomp

import (
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data: nr, arch, instruction pointer, six 64-bit arguments in the machine's (little-endian)
// byte order.
const (
	offsetNr   = 0
	offsetArch = 4
	offsetArgs = 16
)

// reach is how far a conditional jump is let go. The field holds 255; the rest is room for the instructions that branch
// may have to put in between.
const reach = 250

// assembler writes a program backwards: emit puts an instruction before all earlier ones. So every jump target (jumps only
// go forward in classic BPF) exists before the jump, and its distance is known.
type assembler struct {
	rev []unix.SockFilter
	// rets is the place of the newest copy of each RET.
	rets map[uint32]int
}

// target is where a jump goes: a place in rev, or any RET of a value.
type target struct {
	at    int
	value uint32
	isRet bool
}

// ret is the target that ends the program with a value.
func ret(value uint32) target { return target{value: value, isRet: true} }

// emit writes an instruction without jumps.
func (a *assembler) emit(code uint16, k uint32) target {
	a.rev = append(a.rev, unix.SockFilter{Code: code, K: k})
	return target{at: len(a.rev) - 1}
}

// near returns a place within reach of the next instruction that leads to t.
func (a *assembler) near(t target) int {
	if t.isRet {
		at, ok := a.rets[t.value]
		if !ok || len(a.rev)-at > reach {
			at = a.emit(unix.BPF_RET|unix.BPF_K, t.value).at
			if a.rets == nil {
				a.rets = map[uint32]int{}
			}
			a.rets[t.value] = at
		}
		return at
	}
	if d := len(a.rev) - t.at; d > reach {
		return a.emit(unix.BPF_JMP|unix.BPF_JA, uint32(d-1)).at
	}
	return t.at
}

// branch writes a conditional jump on the accumulator: op is BPF_JEQ, BPF_JGT or BPF_JGE, compared with k.
func (a *assembler) branch(op uint16, k uint32, yes, no target) target {
	if yes == no {
		return yes
	}
	y, n := a.near(yes), a.near(no)
	i := len(a.rev)
	a.rev = append(a.rev, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_K | op, K: k, Jt: uint8(i - y - 1), Jf: uint8(i - n - 1)})
	return target{at: i}
}

// jumpTo makes what is written next (which runs before) continue at t.
func (a *assembler) jumpTo(t target) {
	switch {
	case t.isRet:
		a.emit(unix.BPF_RET|unix.BPF_K, t.value)
	case t.at != len(a.rev)-1:
		a.emit(unix.BPF_JMP|unix.BPF_JA, uint32(len(a.rev)-t.at-1))
	}
}

// load writes a load of 32 bits of seccomp_data that continues at t.
func (a *assembler) load(offset uint32, t target) target {
	a.jumpTo(t)
	return a.emit(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset)
}

// program returns what was written, in the order in which it runs.
func (a *assembler) program() []unix.SockFilter {
	p := slices.Clone(a.rev)
	slices.Reverse(p)
	return p
}

// emit writes the choices of a block, the last one first.
func (b *block) emit(out *assembler) target {
	next := ret(b.otherwise)
	for end := len(b.choices); end > 0; {
		start := end - 1
		for start > 0 && sameWord(b.choices[start-1], b.choices[start]) {
			start--
		}
		if end-start > 1 {
			next = equals(out, b.choices[start:end], next)
		} else {
			next = all(out, b.choices[start], next)
		}
		end = start
	}
	return next
}

// sameWord reports whether two choices are a plain comparison for equality each, which differ in the lower half of one
// argument alone; a row of them needs only one load.
func sameWord(x, y choice) bool {
	if len(x.conds) != 1 || len(y.conds) != 1 {
		return false
	}
	a, b := x.conds[0], y.conds[0]
	return a.Op == specs.OpEqualTo && b.Op == specs.OpEqualTo && a.Index == b.Index && a.narrow == b.narrow && a.Value>>32 == b.Value>>32
}

// equals writes a row of choices for which sameWord holds.
func equals(out *assembler, row []choice, miss target) target {
	next := miss
	for i := len(row) - 1; i >= 0; i-- {
		next = out.branch(unix.BPF_JEQ, uint32(row[i].conds[0].Value), ret(row[i].ret), next)
	}
	c := row[0].conds[0]
	next = out.load(c.low(), next)
	if c.narrow {
		return next
	}
	return out.load(c.high(), out.branch(unix.BPF_JEQ, uint32(c.Value>>32), next, miss))
}

// all writes one choice: its conditions one after the other, each of which may end at miss.
func all(out *assembler, ch choice, miss target) target {
	next := ret(ch.ret)
	for i := len(ch.conds) - 1; i >= 0; i-- {
		next = ch.conds[i].emit(out, next, miss)
	}
	return next
}

// low and high are the offsets of the argument's halves.
func (c cond) low() uint32  { return offsetArgs + 8*uint32(c.Index) }
func (c cond) high() uint32 { return c.low() + 4 }

// emit writes one comparison. All arguments are unsigned.
func (c cond) emit(out *assembler, hit, miss target) target {
	lo, hi := uint32(c.Value), uint32(c.Value>>32)
	switch c.Op {
	case specs.OpNotEqual:
		hit, miss = miss, hit
		fallthrough
	case specs.OpEqualTo:
		next := out.load(c.low(), out.branch(unix.BPF_JEQ, lo, hit, miss))
		if c.narrow {
			return next
		}
		return out.load(c.high(), out.branch(unix.BPF_JEQ, hi, next, miss))
	case specs.OpLessEqual, specs.OpLessThan:
		hit, miss = miss, hit // not greater, not greater or equal
		fallthrough
	case specs.OpGreaterThan, specs.OpGreaterEqual:
		op := uint16(unix.BPF_JGT)
		if c.Op == specs.OpGreaterEqual || c.Op == specs.OpLessThan {
			op = unix.BPF_JGE
		}
		next := out.load(c.low(), out.branch(op, lo, hit, miss))
		if c.narrow {
			return next
		}
		same := out.branch(unix.BPF_JEQ, hi, next, miss)
		return out.load(c.high(), out.branch(unix.BPF_JGT, hi, hit, same))
	default: // specs.OpMaskedEqual, as parseRules has made sure: argument & Value == ValueTwo
		next := out.branch(unix.BPF_JEQ, uint32(c.ValueTwo), hit, miss)
		if lo != 0xffffffff {
			out.jumpTo(next)
			next = out.emit(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, lo)
		}
		next = out.load(c.low(), next)
		if c.narrow || hi == 0 && c.ValueTwo>>32 == 0 {
			return next
		}
		next = out.branch(unix.BPF_JEQ, uint32(c.ValueTwo>>32), next, miss)
		out.jumpTo(next)
		next = out.emit(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, hi)
		return out.load(c.high(), next)
	}
}
