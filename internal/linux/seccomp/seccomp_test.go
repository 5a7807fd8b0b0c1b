package seccomp

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"conex/internal/linux/caps"
)

// audits are the AUDIT_ARCH values to try per architecture: its own ABIs and a foreign one.
var audits = map[string][]uint32{
	"amd64": {unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386, unix.AUDIT_ARCH_AARCH64},
	"arm64": {unix.AUDIT_ARCH_AARCH64, unix.AUDIT_ARCH_ARM, unix.AUDIT_ARCH_X86_64},
}

// interesting are argument values at the edges of what rules compare with.
var interesting = []uint64{
	0, 1, 2, 3, 7, 8, 9, 10, 38, 39, 40, 41, 16, 0x20000, 0x20008, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff, 0x100000000, 0x100000008,
	0x100000028, 0xffffffff00000000, 0xffffffffffffffff, 0x7e020000, unix.CLONE_NEWUSER, unix.CLONE_NEWNS | 17, unix.CLONE_VM | unix.CLONE_FS, 17,
}

// check compares a compiled profile with the oracle: every number up to 600 of every ABI, the edges of the number space, and for
// calls with rules on arguments many arguments.
func check(t *testing.T, p *specs.LinuxSeccomp, goarch string) []unix.SockFilter {
	t.Helper()
	prog, err := compile(p, goarch)
	if err != nil {
		t.Fatal(err)
	}
	var numbers []uint32
	for nr := uint32(0); nr < 600; nr++ {
		numbers = append(numbers, nr, nr|x32Bit)
	}
	numbers = append(numbers, 0xeffff, 0xf0000, 0xf0001, 0xf0002, 0xf0005, 0xf0006, 0xf0007, x32Bit-1, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff)
	withArgs := map[string]bool{"socketcall": true, "ipc": true}
	for _, s := range p.Syscalls {
		for _, n := range s.Names {
			withArgs[n] = withArgs[n] || len(s.Args) > 0
		}
	}
	o := newOracle(p, goarch)
	rng := rand.New(rand.NewPCG(1, 2))
	bad := 0
	try := func(d data) {
		want, err := o.verdict(d)
		if err != nil {
			t.Fatal(err)
		}
		got, err := run(prog, d)
		if err != nil {
			t.Fatalf("%+v: %v", d, err)
		}
		if got != want {
			a, name := o.abiOf(d)
			t.Errorf("%s %s nr %#x args %#x: %#x, want %#x", a, name, d.nr, d.args, got, want)
			if bad++; bad > 20 {
				t.FailNow()
			}
		}
	}
	for _, arch := range audits[goarch] {
		for _, nr := range numbers {
			d := data{nr: nr, arch: arch}
			try(d)
			if _, name := o.abiOf(d); !withArgs[name] {
				continue
			}
			narrow := arch == unix.AUDIT_ARCH_I386 || arch == unix.AUDIT_ARCH_ARM
			for i := range 600 {
				for j := range d.args {
					d.args[j] = interesting[rng.IntN(len(interesting))]
					if j == 0 && i < 64 {
						d.args[j] = uint64(i)
					}
					if narrow { // as the kernel presents them
						d.args[j] &= 0xffffffff
					}
				}
				try(d)
			}
		}
	}
	return prog
}

func TestDefaultProfileMatchesItsText(t *testing.T) {
	sets := map[string][]string{"default": caps.Default(), "none": nil, "all": caps.Names(^uint64(0)), "sys_admin": {"CAP_SYS_ADMIN"}}
	for name, set := range sets {
		t.Run(name, func(t *testing.T) {
			prog := check(t, Default(set), runtime.GOARCH)
			t.Logf("%d instructions", len(prog))
		})
	}
	t.Run("arm64", func(t *testing.T) {
		p := Default(caps.Default())
		p.Architectures = []specs.Arch{specs.ArchAARCH64, specs.ArchARM}
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{"sync_file_range2", "arm_sync_file_range", "set_tls", "cacheflush"}, Action: specs.ActAllow})
		check(t, p, "arm64")
	})
}

func TestProfiles(t *testing.T) {
	u := func(n uint) *uint { return &n }
	arg := func(i uint, op specs.LinuxSeccompOperator, v, w uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: i, Op: op, Value: v, ValueTwo: w}
	}
	both := []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32}
	ops := []specs.LinuxSeccompOperator{specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual}
	var everyOp []specs.LinuxSyscall
	calls := []string{"read", "write", "open", "close", "stat", "poll", "lseek"}
	for i, op := range ops {
		everyOp = append(everyOp,
			specs.LinuxSyscall{Names: []string{calls[i]}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{arg(0, op, 0x100000028, 0x28)}},
			specs.LinuxSyscall{Names: []string{calls[i]}, Action: specs.ActErrno, ErrnoRet: u(7), Args: []specs.LinuxSeccompArg{arg(1, op, 8, 8), arg(5, op, 0x80000000, 0)}},
		)
	}
	var far []specs.LinuxSyscall // a program longer than a conditional jump reaches
	for i := range 300 {
		far = append(far, specs.LinuxSyscall{Names: []string{calls[i%3]}, Action: specs.ActErrno, ErrnoRet: u(uint(i + 1)),
			Args: []specs.LinuxSeccompArg{arg(uint(i%6), specs.OpEqualTo, interesting[i%len(interesting)], 0)}})
	}
	tests := map[string]*specs.LinuxSeccomp{
		"native only":        {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read", "nosuchcall", "getpid"}, Action: specs.ActAllow}}},
		"no rules":           {DefaultAction: specs.ActErrno, Architectures: both},
		"32-bit only":        {DefaultAction: specs.ActKillProcess, Architectures: []specs.Arch{specs.ArchX86, specs.ArchARM, specs.ArchMIPS}, Syscalls: []specs.LinuxSyscall{{Names: []string{"read", "exit"}, Action: specs.ActAllow}}},
		"x32 only":           {DefaultAction: specs.ActTrap, Architectures: []specs.Arch{specs.ArchX32}, Syscalls: []specs.LinuxSyscall{{Names: []string{"read", "ioctl", "exit"}, Action: specs.ActLog}}},
		"allow by default":   {DefaultAction: specs.ActAllow, Architectures: both, Syscalls: []specs.LinuxSyscall{{Names: []string{"socket", "semget"}, Action: specs.ActErrno}, {Names: []string{"reboot"}, Action: specs.ActKill}, {Names: []string{"ptrace"}, Action: specs.ActTrace, ErrnoRet: u(5)}}},
		"ENOSYS by default":  {DefaultAction: specs.ActErrno, DefaultErrnoRet: u(uint(unix.ENOSYS)), Architectures: both, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow}}},
		"every operator":     {DefaultAction: specs.ActErrno, Architectures: both, Syscalls: everyOp},
		"argument twice":     {DefaultAction: specs.ActErrno, Architectures: both, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{arg(0, specs.OpEqualTo, 1, 0), arg(0, specs.OpEqualTo, 8, 0), arg(1, specs.OpGreaterThan, 8, 0)}}}},
		"always beats args":  {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActLog, Args: []specs.LinuxSeccompArg{arg(0, specs.OpEqualTo, 1, 0)}}, {Names: []string{"read"}, Action: specs.ActAllow}}},
		"default is no rule": {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActErrno}, {Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{arg(0, specs.OpEqualTo, 1, 0)}}}},
		"far jumps":          {DefaultAction: specs.ActErrno, Architectures: both, Syscalls: far},
	}
	for name, p := range tests {
		t.Run(name, func(t *testing.T) { check(t, p, "amd64") })
	}
}

func TestRefusedProfiles(t *testing.T) {
	big := uint(5000)
	for name, p := range map[string]*specs.LinuxSeccomp{
		"notify":       {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"mount"}, Action: specs.ActNotify}}},
		"listener":     {DefaultAction: specs.ActErrno, ListenerPath: "/run/x.sock"},
		"no default":   {},
		"errno":        {DefaultAction: specs.ActErrno, DefaultErrnoRet: &big},
		"index":        {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}}}}},
		"operator":     {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Op: "SCMP_CMP_LIKE"}}}}},
		"architecture": {DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchS390X}},
	} {
		t.Run(name, func(t *testing.T) {
			prog, err := compile(p, "amd64")
			if err == nil {
				t.Fatalf("compiled to %d instructions", len(prog))
			}
			if (name == "notify" || name == "listener") != errors.Is(err, ErrUnsupported) {
				t.Errorf("errors.Is(%v, ErrUnsupported) is wrong", err)
			}
		})
	}
	if _, err := abis("mips"); err == nil {
		t.Error("mips has a table")
	}
}

func TestParse(t *testing.T) {
	p, err := Parse([]byte(`{"defaultAction":"SCMP_ACT_ALLOW","archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]},{"architecture":"SCMP_ARCH_AARCH64"}],
		"syscalls":[{"name":"mkdir","action":"SCMP_ACT_ERRNO","errnoRet":13},{"names":["mkdirat"],"action":"SCMP_ACT_ERRNO","includes":{"caps":["CAP_SYS_ADMIN"]}}]}`), caps.Default())
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Syscalls) != 1 || p.Syscalls[0].Names[0] != "mkdir" {
		t.Errorf("rules %+v, want mkdir alone", p.Syscalls)
	}
	if p, err := Parse([]byte(`{}`), nil); p != nil || err != nil {
		t.Errorf("empty profile: %v, %v; want no filter", p, err)
	}
	for _, s := range []string{``, `{"defaultAction":"SCMP_ACT_NOTIFY"}`, `{"defaultAction":"x"}`, `[`} {
		if p, err := Parse([]byte(s), nil); err == nil {
			t.Errorf("Parse(%s) = %v", s, p)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, tt := range []struct {
		in   *specs.LinuxSeccomp
		want uint
	}{
		{nil, 0},
		{&specs.LinuxSeccomp{}, unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW},
		{&specs.LinuxSeccomp{Flags: []specs.LinuxSeccompFlag{}}, 0},
		{&specs.LinuxSeccomp{Flags: []specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_TSYNC", specs.LinuxSeccompFlagLog}}, unix.SECCOMP_FILTER_FLAG_LOG},
	} {
		if got, err := Flags(tt.in); got != tt.want || err != nil {
			t.Errorf("Flags(%+v) = %#x, %v; want %#x", tt.in, got, err, tt.want)
		}
	}
	if _, err := Flags(&specs.LinuxSeccomp{Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("WAIT_KILLABLE_RECV: %v", err)
	}
}

// TestGolden fails when the compiler's output or the profiles module changes and the cache key doesn't.
func TestGolden(t *testing.T) {
	const want = "1 f7c60d1e02df3eb4"
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32}}
	for i := uint(0); i < 400; i += 3 {
		s := specs.LinuxSyscall{Names: []string{callsAMD64[i%uint(len(callsAMD64))].name}, Action: specs.ActAllow}
		if i%5 == 0 {
			ops := []specs.LinuxSeccompOperator{specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual}
			s.Args = []specs.LinuxSeccompArg{{Index: i % 6, Value: uint64(i) << (i % 40), ValueTwo: 1, Op: ops[i%7]}}
		}
		p.Syscalls = append(p.Syscalls, s)
	}
	prog, err := compile(p, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(encode(prog))
	if got := fmt.Sprintf("%d %s", compilerVersion, hex.EncodeToString(sum[:8])); got != want {
		t.Errorf("the output is now %q, was %q: raise compilerVersion and record the new hash here", got, want)
	}
	mod, err := os.ReadFile("../../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(mod), "github.com/moby/profiles/seccomp "+profileVersion+"\n") {
		t.Errorf("profileVersion is %s, go.mod has another version of github.com/moby/profiles/seccomp", profileVersion)
	}
}

func TestCache(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "sub")
	first, err := CachedDefault(dir, caps.Default())
	if err != nil {
		t.Fatal(err)
	}
	want, err := Compile(Default(caps.Default()))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(first, want) {
		t.Error("CachedDefault differs from Compile(Default)")
	}
	if p, err := Cached(dir, Default(caps.Default())); err != nil || !slices.Equal(p, want) {
		t.Errorf("Cached differs from Compile: %v", err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.bpf"))
	if err != nil || len(files) != 2 {
		t.Fatalf("cache holds %v, %v; want two files", files, err)
	}
	whole, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	flipped := slices.Clone(whole)
	flipped[len(flipped)-3] ^= 1
	for name, b := range map[string][]byte{"empty": nil, "torn": whole[:len(whole)-8], "flipped": flipped, "longer": append(slices.Clone(whole), 0), "header": whole[:headerSize]} {
		for _, f := range files {
			if err := os.WriteFile(f, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, err := CachedDefault(dir, caps.Default())
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: differs from what was compiled: %v", name, err)
		}
		if got, err := Cached(dir, Default(caps.Default())); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: Cached differs: %v", name, err)
		}
		if b, err := os.ReadFile(files[0]); err != nil || !slices.Equal(b, whole) {
			t.Errorf("%s: the file was not repaired: %v", name, err)
		}
	}
	other, err := CachedDefault(dir, []string{"CAP_SYS_ADMIN"})
	if err != nil || slices.Equal(other, want) {
		t.Errorf("other capabilities gave the same program, %v", err)
	}
	// A folder that can't be made is no reason not to start a container.
	if p, err := CachedDefault("/proc/nothing/here", caps.Default()); err != nil || !slices.Equal(p, want) {
		t.Errorf("without a cache folder: %v", err)
	}
}

// TestTables compares the tables with the C headers of the machine.
func TestTables(t *testing.T) {
	define := regexp.MustCompile(`^#define __NR_(\w+) \(?(?:__X32_SYSCALL_BIT \+ )?(\d+)\)?$`)
	a, err := abis("amd64")
	if err != nil {
		t.Fatal(err)
	}
	for i, header := range []string{"unistd_64.h", "unistd_32.h", "unistd_x32.h"} {
		f, err := os.Open("/usr/include/x86_64-linux-gnu/asm/" + header)
		if err != nil {
			t.Skipf("no kernel headers to compare with: %v", err)
		}
		defer f.Close()
		known := map[string]bool{}
		for s := bufio.NewScanner(f); s.Scan(); {
			m := define.FindStringSubmatch(s.Text())
			if m == nil {
				continue
			}
			want, err := strconv.ParseUint(m[2], 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			known[m[1]] = true
			if got, ok := a[i].number(m[1]); !ok || got != uint32(want)|a[i].base {
				t.Errorf("%s %s: %d %v, want %d", a[i].name, m[1], got, ok, want)
			}
		}
		if len(known) < 300 {
			t.Errorf("%s: only %d calls found", header, len(known))
		}
		if a[i].base == x32Bit {
			for _, c := range callsAMD64 {
				if nr, ok := a[i].number(c.name); ok && !known[c.name] && nr < x32Bit|450 {
					t.Errorf("x32 has no %s", c.name)
				}
			}
		}
	}
	for _, table := range [][]call{callsAMD64[:], calls386[:], callsARM64[:], callsARM[:]} {
		if !slices.IsSortedFunc(table, func(x, y call) int { return strings.Compare(x.name, y.name) }) {
			t.Error("a table is not ordered by name")
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","read"],"action":"SCMP_ACT_ERRNO","args":[{"index":1,"value":3,"op":"SCMP_CMP_GT"}]}]}`))
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_KILL","architectures":["SCMP_ARCH_X86","SCMP_ARCH_X32"],"syscalls":[{"name":"socket","action":"SCMP_ACT_LOG"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(b, caps.Default())
		if err != nil || p == nil {
			return
		}
		prog, err := Compile(p)
		if err != nil {
			t.Fatalf("Parse took it, Compile doesn't: %v", err)
		}
		for _, nr := range []uint32{0, 41, 400, x32Bit, 0xffffffff} {
			if _, err := run(prog, data{nr: nr, arch: audits[runtime.GOARCH][0]}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func FuzzDecode(f *testing.F) {
	f.Add(encode([]unix.SockFilter{{Code: 6, K: 1}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if prog, ok := decode(b); ok && !slices.Equal(encode(prog), b) {
			t.Fatal("decode took what encode didn't write")
		}
	})
}

func BenchmarkCachedDefault(b *testing.B) {
	dir := b.TempDir()
	names := caps.Default()
	for b.Loop() {
		if _, err := CachedDefault(dir, names); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCompileDefault(b *testing.B) {
	names := caps.Default()
	for b.Loop() {
		if _, err := Compile(Default(names)); err != nil {
			b.Fatal(err)
		}
	}
}
