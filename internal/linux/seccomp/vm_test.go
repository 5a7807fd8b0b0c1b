package seccomp

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// data is struct seccomp_data.
type data struct {
	nr, arch uint32
	args     [6]uint64
}

// run interprets a program as the kernel does: classic BPF with the instructions that seccomp allows.
func run(prog []unix.SockFilter, d data) (uint32, error) {
	var mem [64]byte
	binary.LittleEndian.PutUint32(mem[0:], d.nr)
	binary.LittleEndian.PutUint32(mem[4:], d.arch)
	for i, a := range d.args {
		binary.LittleEndian.PutUint64(mem[16+8*i:], a)
	}
	var acc uint32
	for pc := 0; pc < len(prog); pc++ {
		i := prog[pc]
		jump := func(yes bool) {
			if yes {
				pc += int(i.Jt)
			} else {
				pc += int(i.Jf)
			}
		}
		switch i.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			if i.K%4 != 0 || i.K > 60 {
				return 0, fmt.Errorf("load at %d", i.K)
			}
			acc = binary.LittleEndian.Uint32(mem[i.K:])
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(i.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump(acc == i.K)
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			jump(acc > i.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			jump(acc >= i.K)
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			acc &= i.K
		case unix.BPF_RET | unix.BPF_K:
			return i.K, nil
		default:
			return 0, fmt.Errorf("instruction %d: code %#x", pc, i.Code)
		}
	}
	return 0, fmt.Errorf("ran off the end")
}

// oracle says what a profile gives for a call, straight from its text and without any tree: the opposite of the compiler in
// every way of working, so that the two don't share a mistake.
type oracle struct {
	p      *specs.LinuxSeccomp
	goarch string
	last   map[specs.Arch]uint32
}

func newOracle(p *specs.LinuxSeccomp, goarch string) *oracle {
	return &oracle{p: p, goarch: goarch, last: map[specs.Arch]uint32{}}
}

// abiOf finds the ABI of a call and the call's name in it, "" for a number without a name.
func (o *oracle) abiOf(d data) (specs.Arch, string) {
	find := func(t []call, nr uint32) string {
		for _, c := range t {
			if c.nr == nr {
				return c.name
			}
		}
		return ""
	}
	switch {
	case o.goarch == "amd64" && d.arch == unix.AUDIT_ARCH_X86_64 && d.nr >= x32Bit && d.nr != 0xffffffff:
		nr := d.nr - x32Bit
		if n := find(callsX32[:], nr); n != "" {
			return specs.ArchX32, n
		}
		n := find(callsAMD64[:], nr)
		if slices.Contains(notX32[:], n) || slices.ContainsFunc(callsX32[:], func(c call) bool { return c.name == n }) {
			n = ""
		}
		return specs.ArchX32, n
	case o.goarch == "amd64" && d.arch == unix.AUDIT_ARCH_X86_64:
		return specs.ArchX86_64, find(callsAMD64[:], d.nr)
	case o.goarch == "amd64" && d.arch == unix.AUDIT_ARCH_I386:
		return specs.ArchX86, find(calls386[:], d.nr)
	case o.goarch == "arm64" && d.arch == unix.AUDIT_ARCH_AARCH64:
		return specs.ArchAARCH64, find(callsARM64[:], d.nr)
	case o.goarch == "arm64" && d.arch == unix.AUDIT_ARCH_ARM:
		n := find(callsARM[:], d.nr)
		if n == "arm_sync_file_range" { // one number, two names; the default profile has both
			n = "sync_file_range2"
		}
		return specs.ArchARM, n
	}
	return "", ""
}

func (o *oracle) verdict(d data) (uint32, error) {
	a, name := o.abiOf(d)
	archs := o.p.Architectures
	if len(archs) == 0 {
		archs = []specs.Arch{map[string]specs.Arch{"amd64": specs.ArchX86_64, "arm64": specs.ArchAARCH64}[o.goarch]}
	}
	if !slices.Contains(archs, a) {
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	}
	def, err := action(o.p.DefaultAction, o.p.DefaultErrnoRet)
	if err != nil {
		return 0, err
	}
	narrow := a == specs.ArchX86 || a == specs.ArchARM
	var conditional *uint32
	for _, s := range o.p.Syscalls {
		ret, err := action(s.Action, s.ErrnoRet)
		if err != nil {
			return 0, err
		}
		if ret == def {
			continue
		}
		if name != "" && slices.Contains(s.Names, name) {
			if len(s.Args) == 0 {
				return ret, nil
			}
			if conditional == nil && holds(s.Args, d, narrow) {
				conditional = &ret
			}
		}
		if a == specs.ArchX86 && len(s.Args) == 0 && conditional == nil {
			for _, n := range s.Names {
				sub := uint32(0)
				switch name {
				case "socketcall":
					sub = subcall(socketcalls[:], n)
				case "ipc":
					sub = subcall(ipccalls[:], n)
				}
				if sub != 0 && sub == uint32(d.args[0]) {
					conditional = &ret
				}
			}
		}
	}
	if conditional != nil {
		return *conditional, nil
	}
	if def != enosys && o.p.DefaultAction != specs.ActAllow && o.p.DefaultAction != specs.ActLog && o.p.DefaultAction != specs.ActTrace && o.newer(a, d) {
		return enosys, nil
	}
	return def, nil
}

func subcall(t []call, name string) uint32 {
	for _, c := range t {
		if c.name == name {
			return c.nr
		}
	}
	return 0
}

// newer reports whether a number is above all that the profile names, leaving x32's and arm's private ranges out.
func (o *oracle) newer(a specs.Arch, d data) bool {
	if len(o.p.Syscalls) == 0 {
		return false
	}
	nr := d.nr
	if a == specs.ArchX32 {
		nr -= x32Bit
		if nr >= 512 {
			return nr >= 548
		}
	}
	if a == specs.ArchARM && nr >= 0xf0000 {
		return nr >= 0xf0007
	}
	last, ok := o.last[a]
	if !ok {
		for _, s := range o.p.Syscalls {
			for _, n := range s.Names {
				for x := uint32(0); x < 512; x++ {
					e := d
					e.nr = x
					if a == specs.ArchX32 {
						e.nr |= x32Bit
					}
					if _, got := o.abiOf(e); got == n {
						last = max(last, x)
					}
				}
			}
		}
		o.last[a] = last
	}
	return nr > last
}

// holds evaluates the arguments of one rule, with a condition twice on one argument as alternatives.
func holds(args []specs.LinuxSeccompArg, d data, narrow bool) bool {
	count := map[uint]int{}
	twice, any, all := false, false, true
	for _, c := range args {
		count[c.Index]++
		twice = twice || count[c.Index] > 1
		x, v, w := d.args[c.Index], c.Value, c.ValueTwo
		if narrow {
			x, v, w = x&0xffffffff, v&0xffffffff, w&0xffffffff
		}
		r := map[specs.LinuxSeccompOperator]bool{
			specs.OpNotEqual: x != v, specs.OpLessThan: x < v, specs.OpLessEqual: x <= v, specs.OpEqualTo: x == v,
			specs.OpGreaterEqual: x >= v, specs.OpGreaterThan: x > v, specs.OpMaskedEqual: x&v == w,
		}[c.Op]
		any, all = any || r, all && r
	}
	if twice {
		return any
	}
	return all
}
