package seccomp

import (
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// compilerVersion is part of every cache key: raise it whenever Compile's output changes. A test compares the
// output with a recorded hash, so that this isn't forgotten.
const compilerVersion = 1

// maxErrno is the kernel's MAX_ERRNO: larger values would come out of the system call as a success.
const maxErrno = 4095

// enosys is what a call gets that is newer than the profile.
const enosys = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)

// Compile turns a profile into a BPF program for seccomp(2) on this architecture. A nil profile gives a nil program: no
// filter. What it can't express is ErrUnsupported (SCMP_ACT_NOTIFY), never dropped in silence; system calls and
// architectures that this machine doesn't have are skipped, since profiles are written for many machines.
//
// The rules of a profile mean what runc and libseccomp make of them:
//
//   - A rule with the default action does nothing.
//   - For one call, a rule without arguments beats those with; among equals the first one wins.
//   - The conditions of a rule must all hold, but a rule with two conditions on one argument counts as two rules, either of
//     which suffices.
//   - On 32-bit x86, a rule without arguments for a socket or System V IPC call holds for its way through socketcall(2) or
//     ipc(2), too, unless the profile has a rule without arguments for those.
//   - An architecture that the profile doesn't list is answered by killing the process.
//   - If the default action refuses, then calls with a higher number than any that the profile names give ENOSYS. A C
//     library tries a new call first and falls back on ENOSYS alone; with EPERM, programs broke in containers each time the
//     library learned a call that the profile's author had not known.
func Compile(p *specs.LinuxSeccomp) ([]unix.SockFilter, error) {
	return compile(p, runtime.GOARCH)
}

func compile(p *specs.LinuxSeccomp, goarch string) ([]unix.SockFilter, error) {
	if p == nil {
		return nil, nil
	}
	if p.ListenerPath != "" || p.ListenerMetadata != "" {
		return nil, fmt.Errorf("seccomp listener: %w", ErrUnsupported)
	}
	def, err := action(p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, fmt.Errorf("seccomp default action: %w", err)
	}
	used, err := usedABIs(p, goarch)
	if err != nil {
		return nil, err
	}
	rules, err := parseRules(p.Syscalls)
	if err != nil {
		return nil, err
	}
	c := &compiler{
		def: def,
		// An allowing default includes what isn't known yet; one that says ENOSYS by itself needs no help.
		unknown: !slices.Contains([]specs.LinuxSeccompAction{specs.ActAllow, specs.ActLog, specs.ActTrace}, p.DefaultAction) && def != enosys,
		keys:    map[string]int{},
	}
	type arch struct {
		audit uint32
		spans []span
	}
	var arches []arch
	for _, a := range used {
		spans := c.spans(&a, rules)
		// x32 shares the AUDIT_ARCH of x86-64, and so its tree.
		if n := len(arches); a.base == x32Bit {
			i := slices.IndexFunc(arches, func(x arch) bool { return x.audit == a.audit })
			if i < 0 {
				arches = append(arches, arch{a.audit, killSpans(0)})
				i = n
			}
			arches[i].spans = graft(arches[i].spans, spans)
			continue
		}
		if a.audit == unix.AUDIT_ARCH_X86_64 {
			spans = graft(spans, killSpans(x32Bit))
		}
		arches = append(arches, arch{a.audit, spans})
	}

	// The program is written from its end to its beginning, so that the targets of all jumps are known.
	var out assembler
	entries := make([]target, len(arches))
	for i := len(arches) - 1; i >= 0; i-- {
		t := c.tree(&out, merge(arches[i].spans))
		out.jumpTo(t)
		entries[i] = out.emit(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offsetNr)
	}
	next := ret(unix.SECCOMP_RET_KILL_PROCESS)
	for i := len(arches) - 1; i >= 0; i-- {
		next = out.branch(unix.BPF_JEQ, arches[i].audit, entries[i], next)
	}
	out.jumpTo(next)
	out.emit(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offsetArch)
	prog := out.program()
	if len(prog) > unix.BPF_MAXINSNS {
		return nil, fmt.Errorf("seccomp profile needs %d instructions, the kernel takes %d: %w", len(prog), unix.BPF_MAXINSNS, ErrUnsupported)
	}
	return prog, nil
}

// usedABIs returns the ABIs of goarch that the profile lists, or the native one if it lists none at all.
func usedABIs(p *specs.LinuxSeccomp, goarch string) ([]abi, error) {
	have, err := abis(goarch)
	if err != nil {
		return nil, err
	}
	if len(p.Architectures) == 0 {
		return have[:1], nil
	}
	used := slices.DeleteFunc(have, func(a abi) bool { return !slices.Contains(p.Architectures, a.name) })
	if len(used) == 0 {
		return nil, fmt.Errorf("seccomp profile is for %v, none of which runs on %s", p.Architectures, goarch)
	}
	return used, nil
}

// action returns the filter's return value for an action.
func action(a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	e := uint32(unix.EPERM)
	if errno != nil {
		if *errno > maxErrno {
			return 0, fmt.Errorf("errnoRet %d is larger than %d", *errno, maxErrno)
		}
		e = uint32(*errno)
	}
	switch a {
	case specs.ActKill, specs.ActKillThread:
		return unix.SECCOMP_RET_KILL_THREAD, nil
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	case specs.ActTrap:
		return unix.SECCOMP_RET_TRAP, nil
	case specs.ActErrno:
		return unix.SECCOMP_RET_ERRNO | e, nil
	case specs.ActTrace:
		return unix.SECCOMP_RET_TRACE | e, nil
	case specs.ActLog:
		return unix.SECCOMP_RET_LOG, nil
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW, nil
	case specs.ActNotify:
		return 0, fmt.Errorf("action %s: %w", a, ErrUnsupported)
	default:
		return 0, fmt.Errorf("unknown action %q", a)
	}
}

// rule is one entry of a profile with its conditions understood.
type rule struct {
	names []string
	ret   uint32
	// any holds alternatives; each is a list of conditions that must all hold. Without alternatives the rule always holds.
	any [][]specs.LinuxSeccompArg
}

func parseRules(syscalls []specs.LinuxSyscall) ([]rule, error) {
	rules := make([]rule, 0, len(syscalls))
	for _, s := range syscalls {
		ret, err := action(s.Action, s.ErrnoRet)
		if err != nil {
			return nil, fmt.Errorf("seccomp rule for %s: %w", strings.Join(s.Names, ","), err)
		}
		r := rule{names: s.Names, ret: ret}
		var seen [6]bool
		twice := false
		for _, a := range s.Args {
			if a.Index > 5 {
				return nil, fmt.Errorf("seccomp rule for %s: argument index %d is larger than 5", strings.Join(s.Names, ","), a.Index)
			}
			switch a.Op {
			case specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual:
			default:
				return nil, fmt.Errorf("seccomp rule for %s: unknown operator %q", strings.Join(s.Names, ","), a.Op)
			}
			twice = twice || seen[a.Index]
			seen[a.Index] = true
		}
		switch {
		case twice:
			for _, a := range s.Args {
				r.any = append(r.any, []specs.LinuxSeccompArg{a})
			}
		case len(s.Args) > 0:
			r.any = [][]specs.LinuxSeccompArg{s.Args}
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// compiler collects the leaves of the search trees.
type compiler struct {
	// def is the default action's return value.
	def uint32
	// unknown says that calls newer than the profile give ENOSYS.
	unknown bool
	blocks  []block
	// keys finds equal blocks, which the ABIs mostly share.
	keys map[string]int
}

// block is the code for a call whose fate depends on its arguments: the first choice that holds decides, else otherwise.
type block struct {
	choices   []choice
	otherwise uint32
	// at is where the block lies in the program, once it was emitted.
	at *target
}

// choice holds when all its conditions do.
type choice struct {
	conds []cond
	ret   uint32
}

// cond is one comparison of an argument.
type cond struct {
	specs.LinuxSeccompArg
	// narrow comparisons look at the lower 32 bits alone, since the ABI's arguments have no more.
	narrow bool
}

// leaf is what a range of numbers leads to: a block, or the return value if there is none.
type leaf struct {
	block int // index into compiler.blocks plus 1
	ret   uint32
}

// span is a range of system call numbers, from start to the next span's start.
type span struct {
	start uint32
	leaf  leaf
}

// entry is what a profile says about one call.
type entry struct {
	always  *uint32
	choices []choice
}

// spans orders the numbers of one ABI into ranges. The first range starts at the ABI's base; the last one has no end.
func (c *compiler) spans(a *abi, rules []rule) []span {
	entries := map[uint32]*entry{}
	at := func(nr uint32) *entry {
		e := entries[nr]
		if e == nil {
			e = &entry{}
			entries[nr] = e
		}
		return e
	}
	last, known := a.base, false
	for _, r := range rules {
		for _, name := range r.names {
			nr, ok := a.number(name)
			if ok {
				if lo, _ := a.island(); nr < lo {
					last, known = max(last, nr), true
				}
				if r.ret != c.def {
					at(nr).add(r, a.narrow)
				}
			}
			via, sub, muxed := a.multiplexed(name)
			if nr, ok := a.number(via); muxed && ok && r.ret != c.def && len(r.any) == 0 {
				eq := specs.LinuxSeccompArg{Index: 0, Op: specs.OpEqualTo, Value: uint64(sub)}
				at(nr).choices = append(at(nr).choices, choice{[]cond{{eq, a.narrow}}, r.ret})
			}
		}
	}

	numbers := make([]uint32, 0, len(entries))
	for nr := range entries {
		numbers = append(numbers, nr)
	}
	slices.Sort(numbers)

	// What numbers that no rule names give: the default, ENOSYS after the last known one, the default inside the island.
	var gaps []span
	gaps = append(gaps, span{a.base, leaf{ret: c.def}})
	if c.unknown && known {
		gaps = append(gaps, span{last + 1, leaf{ret: enosys}})
		if lo, hi := a.island(); lo < hi {
			gaps = append(gaps, span{lo, leaf{ret: c.def}}, span{hi, leaf{ret: enosys}})
		}
	}
	var out []span
	g := 0
	for _, nr := range numbers {
		for g+1 < len(gaps) && gaps[g+1].start <= nr {
			out = append(out, gaps[g])
			g++
		}
		out = append(out, gaps[g], span{nr, c.leaf(entries[nr])}, span{nr + 1, gaps[g].leaf})
		gaps[g].start = nr + 1
	}
	out = append(out, gaps[g:]...)
	return merge(out)
}

// island returns the range of numbers that lies outside an ABI's ordinary sequence and so says nothing about which calls
// the profile's author knew; lo is beyond every number, and lo == hi, where there is none.
func (a *abi) island() (lo, hi uint32) {
	switch a.name {
	case specs.ArchX32:
		return x32Bit | 512, x32Bit | 548
	case specs.ArchARM:
		return 0xf0000, 0xf0007
	}
	return math.MaxUint32, math.MaxUint32
}

// add puts a rule to an entry.
func (e *entry) add(r rule, narrow bool) {
	if len(r.any) == 0 {
		if e.always == nil {
			e.always = &r.ret
		}
		return
	}
	for _, alt := range r.any {
		ch := choice{ret: r.ret}
		for _, a := range alt {
			if narrow {
				a.Value, a.ValueTwo = uint64(uint32(a.Value)), uint64(uint32(a.ValueTwo))
			}
			ch.conds = append(ch.conds, cond{a, narrow})
		}
		e.choices = append(e.choices, ch)
	}
}

// leaf returns the entry as a leaf, registering its block if it needs one.
func (c *compiler) leaf(e *entry) leaf {
	if e.always != nil {
		return leaf{ret: *e.always}
	}
	key := fmt.Sprint(e.choices)
	if i, ok := c.keys[key]; ok {
		return leaf{block: i}
	}
	c.blocks = append(c.blocks, block{choices: e.choices, otherwise: c.def})
	c.keys[key] = len(c.blocks)
	return leaf{block: len(c.blocks)}
}

// merge orders nothing; it drops empty ranges (a later span with the same start replaces an earlier one) and joins equal
// neighbours.
func merge(in []span) []span {
	var out []span
	for i, s := range in {
		if i+1 < len(in) && in[i+1].start == s.start {
			continue
		}
		if n := len(out); n > 0 && out[n-1].leaf == s.leaf {
			continue
		}
		out = append(out, s)
	}
	return out
}

// killSpans refuses all numbers from start on as those of a foreign ABI.
func killSpans(start uint32) []span {
	return []span{{start, leaf{ret: unix.SECCOMP_RET_KILL_PROCESS}}}
}

// graft lets upper take over the numbers from its start on, except -1: that is no x32 call but the mark that a tracer or
// another filter skips this call, and is judged as any other number that nobody knows.
func graft(lower, upper []span) []span {
	skip := lower[len(lower)-1].leaf
	if i := slices.IndexFunc(lower, func(s span) bool { return s.start == math.MaxUint32 }); i >= 0 {
		skip = lower[i].leaf
	}
	i := slices.IndexFunc(lower, func(s span) bool { return s.start >= upper[0].start })
	if i >= 0 {
		lower = lower[:i]
	}
	return append(append(slices.Clip(lower), upper...), span{math.MaxUint32, skip})
}

// tree emits a binary search over the spans; the accumulator holds the number when it runs.
func (c *compiler) tree(out *assembler, s []span) target {
	if len(s) == 1 {
		return c.emitLeaf(out, s[0].leaf)
	}
	mid := len(s) / 2
	right := c.tree(out, s[mid:])
	left := c.tree(out, s[:mid])
	return out.branch(unix.BPF_JGE, s[mid].start, right, left)
}

func (c *compiler) emitLeaf(out *assembler, l leaf) target {
	if l.block == 0 {
		return ret(l.ret)
	}
	b := &c.blocks[l.block-1]
	if b.at == nil {
		t := b.emit(out)
		b.at = &t
	}
	return *b.at
}
