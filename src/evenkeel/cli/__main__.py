from evenkeel.cli import main

main()
