package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"conex/internal/engine"
	"conex/internal/linux/tty"
)

// maxPassword bounds what --password-stdin reads.
const maxPassword = 1 << 20

func (a *app) loginCommand() *cobra.Command {
	var req engine.LoginRequest
	var stdin bool
	cmd := &cobra.Command{
		Use: "login [OPTIONS] [SERVER]", Short: "Authenticate to a registry", Args: a.between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f := cmd.Flags()
			if len(args) > 0 {
				req.Server = args[0]
			}
			switch {
			case f.Changed("password") && stdin:
				return errors.New("conflicting options: cannot specify both --password and --password-stdin")
			case stdin && req.Username == "":
				return errors.New("the --password-stdin option requires --username to be set")
			case f.Changed("username") && req.Username == "":
				return errors.New("username is empty")
			case f.Changed("password") && req.Password == "":
				return errors.New("password is empty")
			}
			if f.Changed("password") {
				fmt.Fprintln(a.err, "WARNING! Using --password via the CLI is insecure. Use --password-stdin.")
			}
			if stdin {
				raw, err := io.ReadAll(io.LimitReader(a.in, maxPassword+1))
				if err != nil {
					return fmt.Errorf("read password: %w", err)
				}
				if len(raw) > maxPassword {
					return errors.New("the password on standard input is larger than 1 MB")
				}
				if req.Password = strings.TrimRight(string(raw), "\r\n"); req.Password == "" {
					return errors.New("password is empty")
				}
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			req.Ask = func(known string) (string, string, error) { return a.askLogin(req, known) }
			req.Stored = func(username string, failed error) {
				switch {
				case failed == nil:
					fmt.Fprintf(a.err, "Authenticating with existing credentials... [Username: %s]\n\n", username)
					fmt.Fprintf(a.err, " Info -> To login with a different account, run '%s logout' followed by '%s login'\n\n\n", a.name, a.name)
				case errors.Is(failed, engine.ErrDenied):
					fmt.Fprintln(a.err, "Stored credentials invalid or expired")
				default:
					fmt.Fprintln(a.err, "Login did not succeed, error:", failed)
				}
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			r, err := e.Login(ctx, req)
			if err != nil {
				return err
			}
			if r.Helper == "" {
				fmt.Fprintf(a.err, "\nWARNING! Your credentials are stored unencrypted in '%s'.\nConfigure a credential helper to remove this warning. See\n%s\n\n",
					r.File, "https://docs.docker.com/go/credential-store/")
			}
			fmt.Fprintln(a.out, "Login Succeeded")
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&req.Username, "username", "u", "", "Username")
	f.StringVarP(&req.Password, "password", "p", "", "Password or Personal Access Token (PAT)")
	f.BoolVar(&stdin, "password-stdin", false, "Take the Password or Personal Access Token (PAT) from stdin")
	return cmd
}

func (a *app) logoutCommand() *cobra.Command {
	return &cobra.Command{
		Use: "logout [SERVER]", Short: "Log out from a registry", Args: a.between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			server := ""
			if len(args) > 0 {
				server = args[0]
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			fmt.Fprintf(a.out, "Removing login credentials for %s\n", engine.LoginServer(server))
			return e.Logout(cmd.Context(), server)
		},
	}
}

// askLogin asks the user for what a login lacks. The password does not show.
func (a *app) askLogin(req engine.LoginRequest, known string) (user, password string, err error) {
	term, ok := terminal(a.in)
	if !ok {
		return "", "", errors.New("cannot perform an interactive login from a non TTY device")
	}
	// Neither read ends with a context: a signal gives the terminal its mode back and ends the program.
	fd := int(term.Fd())
	hidden := make(chan *tty.State, 1)
	restore := func() {
		select {
		case old := <-hidden:
			tty.Restore(fd, old) //nolint:errcheck // the terminal may be gone; nobody is left to tell
			fmt.Fprintln(a.out)
		default:
		}
	}
	defer restore()
	defer endBySignal(restore)()

	user, password = req.Username, req.Password
	if user == "" {
		if req.Server == "" {
			fmt.Fprintln(a.out, "Log in with your Docker ID or email address, and your password or a personal access token.")
		}
		prompt := "Username: "
		if known != "" {
			prompt = fmt.Sprintf("Username (%s): ", known)
		}
		fmt.Fprint(a.out, prompt)
		if user, err = readLine(term); err != nil {
			return "", "", fmt.Errorf("read username: %w", err)
		}
		if user = strings.TrimSpace(user); user == "" {
			user = known
		}
	}
	if password == "" {
		fmt.Fprint(a.out, "Password: ")
		old, err := tty.HideInput(fd)
		if err != nil {
			return "", "", err
		}
		hidden <- old
		if password, err = readLine(term); err != nil {
			return "", "", fmt.Errorf("read password: %w", err)
		}
	}
	return user, password, nil
}

// endBySignal makes signals that end the program call restore first. stop undoes that.
func endBySignal(restore func()) (stop func()) {
	ch, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	go func() {
		select {
		case s := <-ch:
			restore()
			os.Exit(128 + int(s.(syscall.Signal)))
		case <-done:
		}
	}()
	return func() {
		signal.Stop(ch)
		close(done)
	}
}

// readLine reads up to a newline and not a byte more: what follows is the next question's.
func readLine(r io.Reader) (string, error) {
	var line bytes.Buffer
	b := make([]byte, 1)
	for line.Len() < maxPassword {
		n, err := r.Read(b)
		if n == 1 && b[0] == '\n' {
			break
		}
		line.Write(b[:n])
		if err == io.EOF && line.Len() > 0 {
			break
		}
		if err != nil {
			return "", err
		}
	}
	return strings.TrimRight(line.String(), "\r"), nil
}
