package cli

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// command is an entry of the table of commands. Building a cobra command with its flags costs microseconds that every start
// of the program would pay for all of them, so build runs for those alone whose names are among the arguments.
type command struct {
	name  string
	build func(*app) *cobra.Command
	// common commands stand first in the help.
	common bool
	hidden bool
}

func commands() []command {
	return []command{
		{name: "run", build: (*app).runCommand, common: true},
		{name: "exec", build: (*app).execCommand, common: true},
		{name: "ps", build: (*app).psCommand, common: true},
		{name: "build", build: (*app).buildCommand, common: true},
		{name: "pull", build: (*app).pullCommand, common: true},
		{name: "images", build: (*app).imagesCommand, common: true},
		{name: "version", build: (*app).versionCommand, common: true},
		{name: "info", build: (*app).infoCommand, common: true},

		{name: "builder", build: (*app).builderGroup},
		{name: "buildx", build: (*app).buildxGroup},
		{name: "container", build: (*app).containerGroup},
		{name: "image", build: (*app).imageGroup},
		{name: "manifest", build: (*app).manifestGroup},
		{name: "network", build: (*app).networkGroup},
		{name: "system", build: (*app).systemGroup},
		{name: "volume", build: (*app).volumeGroup},

		{name: "attach", build: (*app).attachCommand},
		{name: "commit", build: (*app).commitCommand},
		{name: "completion", build: (*app).completionCommand},
		{name: "cp", build: (*app).cpCommand},
		{name: "create", build: (*app).createCommand},
		{name: "debug", build: (*app).debugCommand},
		{name: "diff", build: (*app).diffCommand},
		{name: "doctor", build: (*app).doctorCommand},
		{name: "events", build: (*app).eventsCommand},
		{name: "export", build: (*app).exportCommand},
		{name: "history", build: (*app).historyCommand},
		{name: "import", build: (*app).importCommand},
		{name: "inspect", build: (*app).inspectCommand},
		{name: "kill", build: (*app).killCommand},
		{name: "load", build: (*app).loadCommand},
		{name: "login", build: (*app).loginCommand},
		{name: "logout", build: (*app).logoutCommand},
		{name: "logs", build: (*app).logsCommand},
		{name: "pause", build: (*app).pauseCommand},
		{name: "port", build: (*app).portCommand},
		{name: "push", build: (*app).pushCommand},
		{name: "rename", build: (*app).renameCommand},
		{name: "restart", build: (*app).restartCommand},
		{name: "rm", build: (*app).rmCommand},
		{name: "rmi", build: (*app).rmiCommand},
		{name: "runtime", build: (*app).runtimeCommand},
		{name: "save", build: (*app).saveCommand},
		{name: "search", build: (*app).searchCommand},
		{name: "start", build: (*app).startCommand},
		{name: "stats", build: (*app).statsCommand},
		{name: "stop", build: (*app).stopCommand},
		{name: "tag", build: (*app).tagCommand},
		{name: "top", build: (*app).topCommand},
		{name: "unpause", build: (*app).unpauseCommand},
		{name: "update", build: (*app).updateCommand},
		{name: "wait", build: (*app).waitCommand},
		{name: "why", build: (*app).whyCommand},
		{name: "reconcile", build: (*app).reconcileCommand},
	}
}

// notYet are Docker's commands that conex will have, to tell them from typing errors.
var notYet = []string{
	"compose",
	"context",
}

// rootCommand builds the tree that args need.
func (a *app) rootCommand(args []string) *cobra.Command {
	root := &cobra.Command{
		Use:              a.name + " [OPTIONS] COMMAND",
		Short:            "Build images and run containers, without a daemon",
		TraverseChildren: true,
		SilenceErrors:    true,
		SilenceUsage:     true,
		Args:             cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if v, _ := cmd.Flags().GetBool("version"); v {
				a.printVersionLine()
				return nil
			}
			if len(args) > 0 {
				return a.unknownCommand(args[0])
			}
			return cmd.Help()
		},
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetHelpFunc(a.help)
	root.SetUsageFunc(func(cmd *cobra.Command) error { a.help(cmd, nil); return nil })
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return a.usageError(cmd, flagError(err)) })
	root.SetHelpCommand(&cobra.Command{
		Use: "help [COMMAND]", Hidden: true, Short: "Help about a command",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, _, err := cmd.Root().Find(args)
			if err != nil || c == cmd.Root() && len(args) > 0 {
				return a.unknownCommand(args[0])
			}
			return c.Help()
		},
	})
	f := root.Flags()
	f.SetInterspersed(false)
	f.StringVar(&a.config, "config", "", `Configuration file (default "/etc/conex/config.toml")`)
	f.BoolVarP(&a.debug, "debug", "D", false, "Say more about errors and settings")
	f.StringVar(&a.root, "root", "", `Data folder (default "/var/lib/conex")`)
	f.StringVar(&a.state, "state", "", `Folder of the running state (default "/run/conex")`)
	f.StringVar(&a.driver, "storage-driver", "", `Storage driver: "erofs" or "dir" (default: what the kernel can)`)
	f.BoolP("version", "v", false, "Print version information and quit")
	const noDaemon = "there is no daemon to connect to: conex works on this machine's files"
	for _, r := range []struct{ name, short string }{{"host", "H"}, {"context", "c"}, {"tlscacert", ""}, {"tlscert", ""}, {"tlskey", ""}} {
		refuse(f, r.name, r.short, "string", noDaemon)
	}
	refuse(f, "tls", "", "bool", noDaemon)
	refuse(f, "tlsverify", "", "bool", noDaemon)
	refuse(f, "log-level", "l", "string", "there is no daemon whose log it could set; -D shows more of what this command does")

	table := commands()
	all := slices.Contains(args, "--help") || slices.Contains(args, "help") || completing(args)
	for pass := 0; pass < 2 && len(root.Commands()) == 0; pass++ {
		for _, c := range table {
			if all || pass == 1 || slices.Contains(args, c.name) {
				cmd := c.build(a)
				cmd.Hidden = c.hidden
				if c.common {
					cmd.Annotations = map[string]string{"common": "1", "runs": cmd.Annotations["runs"]}
				}
				root.AddCommand(cmd)
			}
		}
	}
	if completing(args) {
		a.complete(root)
	}
	return root
}

// group returns a command that has only others below it.
func (a *app) group(name, short string, sub ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{
		Use: name, Short: short, Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return &exitError{code: 1, help: cmd.CommandPath(), err: fmt.Errorf("'%s' is not a %s command%s", args[0], cmd.CommandPath(), didYouMean(args[0], names(cmd)))}
			}
			return cmd.Help()
		},
	}
	g.AddCommand(sub...)
	return g
}

func names(cmd *cobra.Command) []string {
	var n []string
	for _, c := range cmd.Commands() {
		n = append(append(n, c.Name()), c.Aliases...)
	}
	return n
}

func (a *app) unknownCommand(name string) error {
	if slices.Contains(notYet, name) {
		return &exitError{code: 1, help: a.name, err: fmt.Errorf("'%s' is not a %s command yet", name, a.name)}
	}
	var known []string
	for _, c := range commands() {
		if !c.hidden {
			known = append(known, c.name)
		}
	}
	return &exitError{code: 1, help: a.name, err: fmt.Errorf("'%s' is not a %s command%s", name, a.name, didYouMean(name, known))}
}

// didYouMean returns ", did you mean 'x'?" for the known word that is nearest to word, or "" if none is near.
func didYouMean(word string, known []string) string {
	best, dist := "", 1+max(1, len(word)/3)
	for _, k := range known {
		if d := distance(word, k); d < dist {
			best, dist = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(", did you mean '%s'?", best)
}

// distance is the number of letters to insert, delete, change or swap with a neighbour that turns s into t.
func distance(s, t string) int {
	var before []int
	prev := make([]int, len(t)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(s); i++ {
		cur := make([]int, len(t)+1)
		cur[0] = i
		for j := 1; j <= len(t); j++ {
			cost := 1
			if s[i-1] == t[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && s[i-1] == t[j-2] && s[i-2] == t[j-1] {
				cur[j] = min(cur[j], before[j-2]+1)
			}
		}
		before, prev = prev, cur
	}
	return prev[len(t)]
}

// usageError is a mistake in a command's flags: exit code 125, as with Docker.
func (a *app) usageError(cmd *cobra.Command, err error) error {
	return &exitError{code: 125, err: err, help: cmd.CommandPath()}
}

// rootFlagError does for the global flags what cobra's FlagErrorFunc, which it does not call for them, does for the others.
func (a *app) rootFlagError(root *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	var missing *pflag.ValueRequiredError
	var bad *pflag.InvalidValueError
	var ee *exitError
	if !errors.As(err, &ee) && (errors.As(err, &unknown) || errors.As(err, &missing) || errors.As(err, &bad)) {
		return a.usageError(root, flagError(err))
	}
	return err
}

// flagError takes the words of the flag's own parser where it refuses a flag as a whole.
func flagError(err error) error {
	var r *refusal
	if errors.As(err, &r) {
		return r
	}
	// What is wrong with a number or a switch is said without the name of Go's function.
	var bad *pflag.InvalidValueError
	var num *strconv.NumError
	if errors.As(err, &bad) && errors.As(err, &num) {
		why := "out of range"
		switch {
		case errors.Is(num.Err, strconv.ErrRange):
		case num.Func == "ParseBool":
			why = "neither true nor false"
		case num.Func == "ParseFloat":
			why = "not a number"
		default:
			why = "not a whole number"
		}
		return errors.New(strings.Replace(err.Error(), num.Error(), why, 1))
	}
	return err
}

// atLeast, exactly and between check the number of arguments, in Docker's words.
func (a *app) atLeast(n int) cobra.PositionalArgs { return a.between(n, -1) }

func (a *app) exactly(n int) cobra.PositionalArgs { return a.between(n, n) }

func (a *app) between(lo, hi int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= lo && (hi < 0 || len(args) <= hi) {
			return nil
		}
		var want string
		switch {
		case hi == 0:
			want = "accepts no arguments"
		case lo == hi:
			want = "requires " + count(lo)
		case hi < 0:
			want = "requires at least " + count(lo)
		case lo > 0: // Docker's words for a range
			want = fmt.Sprintf("requires at least %d and at most %d arguments", lo, hi)
		default:
			want = "requires at most " + count(hi)
		}
		return &exitError{code: 1, help: cmd.CommandPath(), err: fmt.Errorf("'%s' %s", cmd.CommandPath(), want)}
	}
}

func count(n int) string {
	if n == 1 {
		return "1 argument"
	}
	return fmt.Sprintf("%d arguments", n)
}

// help prints what --help shows, laid out as Docker's.
func (a *app) help(cmd *cobra.Command, _ []string) {
	out := a.out
	use := cmd.UseLine()
	if cmd.HasSubCommands() && cmd.HasParent() && cmd.Annotations["runs"] == "" {
		use = cmd.CommandPath() + " COMMAND"
	}
	about := cmd.Short
	if cmd.Long != "" {
		about = cmd.Long
	}
	fmt.Fprintf(out, "Usage:  %s\n\n%s\n", strings.TrimSuffix(use, " [flags]"), about)
	if !cmd.HasParent() {
		a.helpCommands(cmd)
	} else if cmd.HasSubCommands() {
		printCommands(a, "Commands", cmd.Commands())
	}
	if al := aliases(cmd); len(al) > 1 {
		fmt.Fprintf(out, "\nAliases:\n  %s\n", strings.Join(al, ", "))
	}
	title := "Options"
	if !cmd.HasParent() {
		title = "Global Options"
	} else if h := cmd.Flags().Lookup("help"); h != nil {
		h.Hidden = h.Shorthand != "" // who reads this knows it; where -h means something else it is listed, as Docker does it
	}
	if flags := cmd.LocalFlags(); flags.HasAvailableFlags() {
		width := 80
		if f, ok := out.(*os.File); ok {
			if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && ws.Col > 0 {
				width = int(ws.Col)
			}
		}
		fmt.Fprintf(out, "\n%s:\n%s", title, flags.FlagUsagesWrapped(width-1))
	}
	if cmd.HasSubCommands() {
		fmt.Fprintf(out, "\nRun '%s COMMAND --help' for more information on a command.\n", cmd.CommandPath())
	}
}

// aliases are the ways to say a command, with and without its group.
func aliases(cmd *cobra.Command) []string {
	if !cmd.HasParent() || cmd.HasSubCommands() && cmd.Annotations["runs"] == "" {
		return nil
	}
	root, parent, name := cmd.Root().CommandPath(), cmd.Parent().CommandPath(), cmd.Name()
	group, alone := parent, name
	if !cmd.Parent().HasParent() {
		group, name = groupOf(name)
		if group == "" {
			return nil
		}
		group = root + " " + group
	} else {
		alone = commandName(cmd)
	}
	al := []string{group + " " + name}
	for _, n := range cmd.Aliases {
		al = append(al, group+" "+n)
	}
	if !strings.Contains(alone, " ") && alone != "help" {
		al = append(al, root+" "+alone)
	}
	return al
}

// groupOf is the group that a command without one has its place in, and its name there.
func groupOf(name string) (group, inGroup string) {
	switch name {
	case "attach", "commit", "cp", "create", "debug", "diff", "exec", "export", "kill", "logs", "pause", "port", "rename", "restart", "rm", "run", "start", "stats",
		"stop", "top", "unpause", "update", "wait", "why":
		return "container", name
	case "build", "history", "import", "load", "pull", "push", "save", "tag":
		return "image", name
	case "ps":
		return "container", "ls"
	case "images":
		return "image", "ls"
	case "rmi":
		return "image", "rm"
	case "events", "info":
		return "system", name
	}
	return "", ""
}

func (a *app) helpCommands(root *cobra.Command) {
	var common, groups, rest []*cobra.Command
	for _, c := range root.Commands() {
		switch {
		case c.Hidden || c.Name() == "help":
		case c.Annotations["common"] != "":
			common = append(common, c)
		case c.HasSubCommands() && c.Annotations["runs"] == "":
			groups = append(groups, c)
		default:
			rest = append(rest, c)
		}
	}
	printCommands(a, "Common Commands", common)
	printCommands(a, "Management Commands", groups)
	printCommands(a, "Commands", rest)
}

func printCommands(a *app, title string, cmds []*cobra.Command) {
	if len(cmds) == 0 {
		return
	}
	fmt.Fprintf(a.out, "\n%s:\n", title)
	for _, c := range cmds {
		if !c.Hidden {
			fmt.Fprintf(a.out, "  %-11s %s\n", c.Name(), c.Short)
		}
	}
}

// noShortHelp keeps cobra from taking -h, which is --hostname's or --human's in some commands, for help; Docker has --help alone.
func noShortHelp(f *pflag.FlagSet) { f.Bool("help", false, "Print usage") }
